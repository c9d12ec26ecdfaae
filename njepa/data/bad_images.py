"""How many unreadable images a run bears: ``data.on_error`` and ``data.max_bad_frac``."""

from __future__ import annotations

from collections.abc import Iterable

from njepa.config import ConfigError, DataConfig
from njepa.data.errors import DataError
from njepa.data.index import ImageIndex

WAY_OUT = (
    "Copy them again, or list the good images with 'njepa scan PATH --out good.txt' and set "
    "data.path=good.txt"
)


def check_source(config: DataConfig, index: ImageIndex) -> None:
    """Hold what the index left out against both settings.

    Raises:
        ConfigError: more than they allow.
    """
    if index.unreadable and config.on_error == "stop":
        raise ConfigError(
            f"data.on_error=stop, and {len(index.unreadable)} of the images of {index.root} are "
            f"unreadable: {_some(index.unreadable)}. {WAY_OUT}, or set data.on_error=skip"
        )
    if _too_many(config, index, 0):
        raise ConfigError(_told(config, index, []))


class BadImages:
    """The unreadable images of a run, each counted once, whichever rank has met it."""

    def __init__(self, config: DataConfig, index: ImageIndex) -> None:
        self._config, self._index = config, index
        self._met: dict[int, None] = {}  # a set that keeps the order

    def add(self, samples: Iterable[int]) -> None:
        """Take the ids of samples that were replaced."""
        self._met |= dict.fromkeys(samples)

    def check(self) -> None:
        """Hold them against ``data.max_bad_frac``.

        Raises:
            DataError: there are more.
        """
        if _too_many(self._config, self._index, len(self._met)):
            raise DataError(_told(self._config, self._index, list(self._met)))


def _too_many(config: DataConfig, index: ImageIndex, met: int) -> bool:
    bad = len(index.unreadable) + met
    return bad > config.max_bad_frac * (index.n + len(index.unreadable))


def _told(config: DataConfig, index: ImageIndex, met: list[int]) -> str:
    named = [*(index.name(i) for i in met[-5:]), *index.unreadable]  # the latest first
    bad, total = len(index.unreadable) + len(met), index.n + len(index.unreadable)
    return (
        f"{bad} of the {total} images of {index.root} are unreadable, {bad / total:.2%}, which is "
        f"more than data.max_bad_frac={config.max_bad_frac:g}: {_some(named)}. {WAY_OUT}; or "
        f"raise data.max_bad_frac"
    )


def _some(names: list[str]) -> str:
    return "; ".join(names[:5]) + ("; ..." if len(names) > 5 else "")
