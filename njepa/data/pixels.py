"""What the two backends share: which window of which image, and the form of what they deliver."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from njepa.config import DataConfig
from njepa.data.decode import check_shape, decode
from njepa.data.errors import DecodeError
from njepa.data.index import ImageIndex, measure
from njepa.draws.crops import crop_windows, flips
from njepa.draws.order import Planned, SampleOrder

T = TypeVar("T")


class Pixels(NamedTuple):
    """One micro-batch of images."""

    images: Tensor
    """uint8 [B, S, S, 3], contiguous."""
    ids: npt.NDArray[np.int64]
    """[B]: the planned samples whose windows these are."""
    unreadable: list[tuple[int, str]]
    """Sample ids that were replaced by others, with the reason."""


class PixelSource(Protocol):
    """A backend: the pixels of consecutive micro-steps."""

    def __next__(self) -> Pixels: ...

    def close(self) -> None: ...


class View(NamedTuple):
    """What stands in a slot of a micro-batch: the planned sample or one in its place."""

    sample: int
    window: npt.NDArray[np.int64]
    """[4]: left, top, width, height."""


class Views:
    """Which window of which image stands where: the same for both backends.

    Args:
        config, seed, index, order: as of the loader.
    """

    def __init__(
        self, config: DataConfig, seed: int, index: ImageIndex, order: SampleOrder
    ) -> None:
        self._config, self._seed, self._index, self._order = config, seed, index, order

    def planned(self, plan: Planned) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Crop windows [B, 4] (left, top, width, height) and flips [B] of a micro-batch."""
        mirrored = flips(self._seed, plan.epoch, plan.ids, self._config.hflip)
        return self._windows(plan, plan.ids, plan.ids), mirrored

    def first_readable(
        self, plan: Planned, slot: int, window: npt.NDArray[np.int64], read: Callable[[View], T]
    ) -> tuple[T, str]:
        """What ``read`` makes of the image planned for ``slot``, or of one in its place.

        An unreadable image is replaced by the next readable sample of the epoch's order, seen
        through the crop draws of the planned one.

        Args:
            window: of the planned image.
            read: raises OSError or DecodeError where an image is unreadable.

        Returns:
            That, and why the planned image is unreadable (empty: it is not).

        Raises:
            DecodeError: everything that could replace the image is unreadable, too.
        """
        try:
            return read(View(int(plan.ids[slot]), window)), ""
        except (OSError, DecodeError) as error:
            reason = str(error)
        planned = plan.ids[slot : slot + 1]
        for other in self._order.replacements(plan.micro_step, slot):
            window = self._windows(plan, planned, np.array([other]))[0]
            try:
                return read(View(other, window)), reason
            except (OSError, DecodeError):
                continue
        raise DecodeError(
            f"{self._index.name(int(plan.ids[slot]))} ({reason}) is unreadable, and so is every "
            f"image that could replace it; look at the source with: njepa scan PATH --out good.txt"
        )

    def _windows(
        self, plan: Planned, drawn: npt.NDArray[np.int64], seen: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Windows of the samples ``seen`` by the draws of the samples ``drawn``, [n, 4]."""
        index, config = self._index, self._config
        return crop_windows(
            self._seed,
            plan.epoch,
            drawn,
            index.widths[seen],
            index.heights[seen],
            config.crop_scale,
            config.crop_ratio,
        )


def decode_sample(index: ImageIndex, sample: int, data: bytes) -> Tensor:
    """uint8 [3, H, W] of the encoded bytes of a sample.

    Raises:
        DecodeError: not a complete image of the size that was indexed.
    """
    check_rewritten(index, sample, data)
    image = decode(data)
    check_shape((image.shape[2], image.shape[1]), index.shape(sample))
    return image


def check_rewritten(index: ImageIndex, sample: int, data: bytes) -> None:
    """Look at the header of a file that was written again: it may ask for any memory.

    Raises:
        DecodeError: no image of the size that was indexed.
    """
    if len(data) != index.sizes[sample]:
        width, height, why = measure(data, len(data))
        if why:
            raise DecodeError(why)
        check_shape((width, height), index.shape(sample))
