"""Open ``data.path``: the cached index of files, lists, shards, Parquet or the embedded set."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from njepa.atomic import replacing
from njepa.data import parquet
from njepa.data.folders import Watch
from njepa.data.index import ImageIndex, Int64Array, Known, build_index
from njepa.data.listing import Source, find_source
from njepa.runs.place import waiting

logger = logging.getLogger(__name__)

_FORMAT = 3  # of the cached file; another number makes it be built again


def cache_dir(configured: Path | None) -> Path:
    """Where indices and the embedded set are kept: ``data.cache_dir`` or ``~/.cache/njepa``."""
    return (configured or Path("~/.cache/njepa")).expanduser()


def open_source(path: Path | None, cache: Path | None = None, progress: bool = True) -> ImageIndex:
    """The index of ``path``, from the cache where the source has not changed.

    Several processes may call it at once: the first builds, the others wait and read the cache.

    Args:
        path: folder, list file, tar shards or Parquet; None: the training side of the embedded
            set.
        cache: ``data.cache_dir``.
        progress: show a progress bar while headers are read.

    Raises:
        SourceError: nothing there, or no readable image; says what was found and expected.
    """
    folder = cache_dir(cache)
    if path is None:
        from njepa.data.shapes import ensure_shapes  # renders images: only where needed

        path, _ = ensure_shapes(folder, progress)
    path = Path(path).expanduser()
    key = hashlib.sha256(os.fsencode(str(path.absolute()))).hexdigest()[:16]
    cached = folder / f"index-{key}.npz"
    # Before the lock where nothing is cached: a path that is wrong leaves no cache folder.
    source = None if cached.exists() else find_source(path, progress)
    with _lock(cached):
        index = _current(cached, path, source, progress)
    if index.unreadable:
        logger.warning(
            "%s: left out %d of %d images whose header cannot be read: %s%s",
            path.absolute(),
            len(index.unreadable),
            len(index.unreadable) + index.n,
            "; ".join(index.unreadable[:5]),
            "; ..." if len(index.unreadable) > 5 else "",
        )
    return index


@dataclass(frozen=True)
class _Stored:
    """A cached index, and what tells whether it is still that of the source."""

    fingerprint: str
    index: ImageIndex
    times: Int64Array
    """See ``Known``."""
    watch: Watch | None

    def unchanged(self) -> bool:
        """Whether no folder of the source has changed; False: every file must be looked at.

        With unreadable images it always is: one may have been copied again in place.
        """
        index = self.index
        return (
            self.watch is not None
            and not index.unreadable
            and self.watch.holds(index.root, index.names, index.sizes)
        )


def _current(cached: Path, path: Path, source: Source | None, progress: bool) -> ImageIndex:
    stored = _load(cached)
    if stored is not None and stored.unchanged():
        logger.info("%s: the cached index is used, no folder has changed", path)
        return stored.index
    source = source or find_source(path, progress)
    if stored is not None and stored.fingerprint == source.fingerprint():
        index = stored.index
        if source.watch is None or index.unreadable:
            return index
    else:
        if source.kind == "parquet":
            parquet.check_random_reads(source.path, source.root, source.files)
        known = None if stored is None else Known(stored.index, stored.times)
        index = build_index(source, progress, known)
    _save(cached, source, index)
    return index


def _load(cached: Path) -> _Stored | None:
    """What is cached; None where there is nothing or the format has changed."""
    try:
        with np.load(cached, allow_pickle=False) as file:
            if "format" not in file or int(file["format"]) != _FORMAT:
                return None
            labels, watched = _numbers(file, "labels"), _unpack(file["watched"])
            widths, heights = _numbers(file, "widths"), _numbers(file, "heights")
            (root,) = _unpack(file["root"])
            index = ImageIndex(
                Path(root), _unpack(file["names"]), widths, heights,
                _numbers(file, "sizes"), labels if len(labels) else None, _unpack(file["classes"]),
                _unpack(file["shards"]), _numbers(file, "shard"), _numbers(file, "offsets"),
                _unpack(file["unreadable"]), str(file["digest"]),
            )  # fmt: skip
            times = _numbers(file, "watched_times")
            watch = Watch(watched, times, int(file["listed"])) if watched else None
            rows = (index.widths, index.heights, index.sizes, index.shard, index.offsets)
            if {len(row) for row in rows} != {index.n} or len(labels) not in (0, index.n):
                raise ValueError("its parts differ in length")
            return _Stored(str(file["fingerprint"]), index, _numbers(file, "times"), watch)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file makes the reader raise almost anything
        logger.warning("%s is damaged and will be built again: %s", cached, error)
        return None


def _numbers(file: Any, key: str) -> npt.NDArray[Any]:
    found = file[key]
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind != "i":
        raise ValueError(f"{key} is no row of integers")
    return found


def _save(cached: Path, source: Source, index: ImageIndex) -> None:
    watch = source.watch or Watch([], np.empty(0, np.int64), 0)
    arrays = {
        "format": np.array(_FORMAT),
        "fingerprint": np.array(source.fingerprint()),
        "digest": np.array(index.digest),
        "root": _pack([str(index.root)]),
        "names": _pack(index.names),
        "classes": _pack(index.classes),
        "shards": _pack(index.shards),
        "unreadable": _pack(index.unreadable),
        "labels": index.labels if index.labels is not None else np.empty(0, np.int64),
        "times": _times(source, index),
        "watched": _pack(watch.paths),
        "watched_times": watch.times,
        "listed": np.array(watch.listed),
        **{k: getattr(index, k) for k in ("widths", "heights", "sizes", "shard", "offsets")},
    }
    try:
        with replacing(cached) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        logger.warning("the index of %s is not cached in %s: %s", source.path, cached, error)


def _times(source: Source, index: ImageIndex) -> Int64Array:
    """Modification times of the files of an index in ns; of shards none."""
    if source.kind not in ("folder", "list"):
        return np.empty(0, np.int64)
    of_file = dict(zip(source.files, source.times.tolist(), strict=True))
    return np.array([of_file[name] for name in index.names], np.int64)


def _pack(lines: list[str]) -> npt.NDArray[np.uint8]:
    """Strings as one array of bytes; a file name holds no NUL."""
    return np.frombuffer(os.fsencode("".join(f"{line}\0" for line in lines)), dtype=np.uint8)


def _unpack(packed: npt.NDArray[np.uint8]) -> list[str]:
    return os.fsdecode(packed.tobytes()).split("\0")[:-1]


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
        with waiting(), contextlib.suppress(OSError):  # without locks: the write is atomic
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
