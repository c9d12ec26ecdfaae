"""The folder of a run: claimed by one run at a time, never overwritten by another.

Holds ``config.yaml``, ``ds.json``, ``metrics.jsonl``, ``summary.json``, ``report.html``,
``checkpoints/`` and ``tensorboard/``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import tempfile
from pathlib import Path
from typing import IO, Any

from njepa.atomic import write_atomically
from njepa.config import Config, ConfigError, dump_config, free_on_resume
from njepa.config.deepspeed_file import DeepSpeedFile
from njepa.config.reading import read_yaml, read_yaml_file

#: In a run folder: what ``njepa probe --kind decode`` draws and ``njepa report`` shows.
DECODE_PICTURE = "decode.png"


class RunFolder:
    """Claim ``config.run.dir`` for this process (rank 0 only); ``begin`` starts the run in it.

    Raises:
        ConfigError: it holds a run and ``run.resume`` is false, another process works in it, or
            the run in it was started with other settings.
    """

    def __init__(self, config: Config, ds: DeepSpeedFile) -> None:
        self.path = run_dir(config)
        held = _holds_run(self.path, config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held for the run)
        except OSError as error:
            raise ConfigError(f"run.dir={self.path} cannot be written: {error}") from None
        _lock(self._lock, self.path)
        self._config, self._ds, self._begun = config, ds, held
        if held:
            try:
                _check_same_run(self.path / "config.yaml", config)
            except ConfigError:
                self.close()
                raise

    @property
    def config(self) -> Config:
        """What runs in it."""
        return self._config

    def begin(self) -> None:
        """Record what runs; from here on the folder holds a run.

        Raises:
            OSError: it cannot be written; the folder holds a run only where it did before.
        """
        ds = json.dumps(dict(self._ds.raw), indent=2) + "\n"
        write_atomically(self.path / "ds.json", ds)
        write_atomically(self.path / "config.yaml", dump_config(self._config))
        self._begun = True

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Release the folder; one in which no run began is left as it was found."""
        if not self._begun:
            (self.path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: it was there before
                self.path.rmdir()
        self._lock.close()


def check_claim(config: Config) -> None:
    """Whether ``RunFolder`` could claim ``config.run.dir``; leaves everything as it is.

    Raises:
        ConfigError: as ``RunFolder``.
    """
    path = run_dir(config)
    held = _holds_run(path, config)
    try:
        with tempfile.TemporaryFile(dir=existing_part(path)):
            pass
        if (path / ".lock").is_file():
            with open(path / ".lock", "a") as lock:
                _lock(lock, path)
    except OSError as error:
        raise ConfigError(f"run.dir={path} cannot be written: {error}") from None
    if held:
        _check_same_run(path / "config.yaml", config)


def existing_part(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def run_dir(config: Config) -> Path:
    """``run.dir``, by default ``runs/<recipe>``."""
    return config.run.dir or Path("runs") / config.recipe


def _holds_run(path: Path, config: Config) -> bool:
    """Whether there is a run, which ``config`` then continues."""
    try:
        held = (path / "config.yaml").is_file()
    except OSError as error:
        raise ConfigError(f"run.dir={path} cannot be read: {error}") from None
    if held and not config.run.resume:
        raise ConfigError(
            f"run.dir={path} already holds a run; continue it with run.resume=true, or choose "
            f"another run.dir"
        )
    return held


def _lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"run.dir={path} is in use by another process; wait for it or choose another"
        ) from None


def _check_same_run(file: Path, config: Config) -> None:
    before, now = (
        flat(read_yaml_file(file, str(file))),
        flat(read_yaml(dump_config(config), "the configuration")),
    )
    changed = [
        f"  {key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not free_on_resume(key)
    ]
    if changed:
        raise ConfigError(
            "run.resume=true, but the run was started with other settings:\n"
            + "\n".join(changed)
            + "\nrestore them, or start a new run in another run.dir"
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for name, sub in tree.items()
        for k, v in flat(sub, f"{prefix}.{name}".lstrip(".")).items()
    }
