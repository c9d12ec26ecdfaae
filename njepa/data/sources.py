"""Open ``data.path``: the cached index of a folder, a list file, tar shards or the embedded set."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from njepa.data.index import ImageIndex, build_index
from njepa.data.listing import Source, find_source

logger = logging.getLogger(__name__)

_FORMAT = 1  # of the cached file; another number makes it be built again


def cache_dir(configured: Path | None) -> Path:
    """Where indices and the embedded set are kept: ``data.cache_dir`` or ``~/.cache/njepa``."""
    return (configured or Path("~/.cache/njepa")).expanduser()


def open_source(path: Path | None, cache: Path | None = None, progress: bool = True) -> ImageIndex:
    """The index of ``path``, from the cache where the source has not changed.

    Several processes may call it at once: the first builds, the others wait and read the cache.

    Args:
        path: folder, list file or tar shards; None: the training side of the embedded set.
        cache: ``data.cache_dir``.
        progress: show a progress bar while headers are read.

    Raises:
        SourceError: nothing there, or no readable image; says what was found and expected.
    """
    folder = cache_dir(cache)
    if path is None:
        from njepa.data.shapes import ensure_shapes  # renders images: only where needed

        path, _ = ensure_shapes(folder, progress)
    source = find_source(Path(path).expanduser())
    key = hashlib.sha256(os.fsencode(str(source.path))).hexdigest()[:16]
    cached = folder / f"index-{key}.npz"
    with _lock(cached):
        index = _load(cached, source)
        if index is None:
            index = build_index(source, progress)
            _save(cached, source, index)
    if index.unreadable:
        logger.warning(
            "%s: left out %d of %d images whose header cannot be read: %s%s",
            source.path,
            len(index.unreadable),
            len(index.unreadable) + index.n,
            "; ".join(index.unreadable[:5]),
            "; ..." if len(index.unreadable) > 5 else "",
        )
    return index


def _load(cached: Path, source: Source) -> ImageIndex | None:
    """The cached index; None where there is none, or the source or the format has changed."""
    try:
        with np.load(cached, allow_pickle=False) as file:
            if str(file["key"]) != f"{_FORMAT} {source.fingerprint()}":
                return None
            labels = file["labels"]
            return ImageIndex(
                source.root, _unpack(file["names"]), file["widths"], file["heights"],
                file["sizes"], labels if len(labels) else None, _unpack(file["classes"]),
                source.files if source.kind == "shards" else [], file["shard"], file["offsets"],
                _unpack(file["unreadable"]), str(file["digest"]),
            )  # fmt: skip
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged and will be built again: %s", cached, error)
        return None


def _save(cached: Path, source: Source, index: ImageIndex) -> None:
    arrays = {
        "key": np.array(f"{_FORMAT} {source.fingerprint()}"),
        "digest": np.array(index.digest),
        "names": _pack(index.names),
        "classes": _pack(index.classes),
        "unreadable": _pack(index.unreadable),
        "labels": index.labels if index.labels is not None else np.empty(0, np.int64),
        **{k: getattr(index, k) for k in ("widths", "heights", "sizes", "shard", "offsets")},
    }
    try:
        handle, temporary = tempfile.mkstemp(dir=cached.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, cached)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        logger.warning("the index of %s is not cached in %s: %s", source.path, cached, error)


def _pack(lines: list[str]) -> npt.NDArray[np.uint8]:
    """Strings as one array of bytes; a file name holds no NUL."""
    return np.frombuffer(b"".join(os.fsencode(line) + b"\0" for line in lines), dtype=np.uint8)


def _unpack(packed: npt.NDArray[np.uint8]) -> list[str]:
    return [os.fsdecode(line) for line in packed.tobytes().split(b"\0")[:-1]]


@contextlib.contextmanager
def _lock(cached: Path) -> Iterator[None]:
    """One builder at a time on this machine; released by the system if the holder dies."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        file = open(cached.with_suffix(".lock"), "wb")  # noqa: SIM115
    except OSError:  # a read-only cache: build without one
        yield
        return
    with file:
        with contextlib.suppress(OSError):  # a file system without locks: the write is atomic
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
