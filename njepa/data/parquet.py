"""Images in Parquet files: all rows in order for the index, single rows at random for a loader.

A row cannot be read alone: its row group is decoded up to its end, row by row, so that one which
unpacks to far more than the file has (a dictionary names one value a million times) is refused
when it does and not held before. Groups that were decoded stay in a cache
of each process, at most ``CACHE_BYTES`` of them, so a set that fits is decoded once; of a larger
one every image costs about a group. Files are opened for each group and closed again, and pyarrow's
threads stay off, so nothing of it lives across a fork.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from njepa.data.errors import SourceError
from njepa.data.parquet_layout import Layout, pyarrow, read_footer

logger = logging.getLogger(__name__)

#: Decoded row groups that a process keeps.
CACHE_BYTES = 128 << 20
#: Larger row groups are refused where the set does not fit into the cache.
GROUP_BYTES = 32 << 20

#: A row group that unpacks to more is refused.
UNPACKED_BYTES = 1 << 30

_THREADS = 4


class _TooLarge(OSError):
    """A row group over ``UNPACKED_BYTES``."""


class Row(NamedTuple):
    """An image of the index."""

    name: str
    """File, slash, number of the row."""
    label: str | None
    size: int
    """Encoded bytes."""
    file: int
    row: int
    width: int
    height: int
    fault: str
    """Why it is unreadable; empty: it is readable."""


class _Footer(NamedTuple):
    stamp: tuple[int, int]
    """Bytes and time of the file: one that is written again has other row groups."""
    metadata: Any
    layout: Layout
    starts: list[int]
    """First row of each row group, and the number of rows."""


def check(path: Path, root: Path, files: list[str]) -> None:
    """Look at the footers of all files of a source.

    Raises:
        SourceError: a damaged file, no row at all, no image column, or columns that differ.
    """
    first, rows = _footer(root / files[0]), 0
    for file in files:
        footer = _footer(root / file)
        rows += footer.starts[-1]
        if footer.layout != first.layout:
            raise SourceError(
                f"data: the Parquet files of {path} differ: {files[0]} has "
                f"{_described(first.layout)}, {file} has {_described(footer.layout)}; give "
                f"data.path a pattern that matches files of one kind, such as train-*.parquet"
            )
    if not rows:
        raise SourceError(
            f"data: no row in the {len(files)} Parquet file(s) of {path}; expected one image a row"
        )


def check_random_reads(path: Path, root: Path, files: list[str]) -> None:
    """Refuse row groups that are hopeless to train from, and warn of what is slow.

    Raises:
        SourceError: a row group over ``GROUP_BYTES`` in a set over ``CACHE_BYTES``.
    """
    groups = [
        (size, rows, file)
        for file in files
        for size, rows in _group_sizes(_footer(root / file))
    ]  # fmt: skip
    total = sum(size for size, _, _ in groups)
    if total <= CACHE_BYTES:
        return
    size, rows, file = max(groups)
    if size > GROUP_BYTES:
        raise SourceError(
            f"data: {file} has a row group of {rows} images and {size / 2**20:.0f} MiB, of which "
            f"every image read at random decodes all; at most {GROUP_BYTES >> 20} MiB are taken "
            f"where a set is over {CACHE_BYTES >> 20} MiB. Write tar shards once and train from "
            f"them: njepa convert {path} OUT"
        )
    logger.warning(
        "%s: an image read at random decodes a row group, %.1f MiB for one of %.3f MiB on average; "
        "tar shards are read in place: njepa convert %s OUT",
        path,
        total / len(groups) / 2**20,
        total / sum(rows for _, rows, _ in groups) / 2**20,
        path,
    )


def read_rows(
    root: Path,
    files: list[str],
    measure: Callable[[bytes], tuple[int, int, str]],
    quiet: bool | None,
) -> list[Row]:
    """Every row of every file, in order; each row group is decoded once.

    Args:
        measure: width, height and fault of an encoded image.
        quiet: as ``disable`` of tqdm.

    Raises:
        SourceError: a row group that cannot be decoded or unpacks to more than ``UNPACKED_BYTES``,
            or labels on some rows only.
    """
    tasks = [
        (k, group)
        for k, file in enumerate(files)
        for group in range(_footer(root / file).metadata.num_row_groups)
    ]

    def one(task: tuple[int, int]) -> list[Row]:
        k, group = task
        try:
            return list(_group_rows(root, files[k], k, group, measure))
        except _TooLarge as error:
            raise SourceError(
                f"data: {error}. Write the file again with smaller row groups, or leave it out by "
                f"a pattern"
            ) from None
        except OSError as error:
            raise SourceError(
                f"data: {error}. The file is damaged: copy it again, or leave it out by a pattern"
            ) from None

    total = sum(_footer(root / file).starts[-1] for file in files)
    rows: list[Row] = []
    pool = ThreadPoolExecutor(_THREADS)
    try:
        with tqdm(total=total, desc="reading Parquet", unit="img", disable=quiet) as bar:
            for found in pool.map(one, tasks):
                rows += found
                bar.update(len(found))
    finally:
        pool.shutdown(cancel_futures=True)
    bare = [row.name for row in rows if row.label is None]
    if bare and len(bare) < len(rows):
        raise SourceError(
            f"data: {len(bare)} of {len(rows)} rows have no label (null or -1), the first is "
            f"{bare[0]}; expected labels on every row or on none: give data.path a pattern that "
            f"leaves these files out, such as train-*.parquet"
        )
    return rows


def read_row(path: Path, row: int) -> bytes:
    """Encoded bytes of one row, through the cache of this process.

    Raises:
        OSError: the file or the row cannot be read.
    """
    footer = _footer_of_reader(path)
    group = bisect_right(footer.starts, row) - 1
    if not 0 <= group < len(footer.starts) - 1:
        raise OSError(f"{path} has {footer.starts[-1]} rows, row {row} is wanted")
    return _encoded(_groups().get(path, group, footer)[row - footer.starts[group]].as_py())


class _GroupCache:
    """The row groups that were used last; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Path, tuple[int, int], int], Any] = OrderedDict()
        self._bytes = 0

    def get(self, path: Path, group: int, footer: _Footer) -> Any:
        key = (path, footer.stamp, group)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        column = _read_group(path, group, footer)  # threads decode different groups at once
        with self._lock:
            if key not in self._kept:
                self._kept[key] = column
                self._bytes += column.nbytes
            while self._bytes > CACHE_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return column


_caches: dict[int, _GroupCache] = {}  # by process: a forked one cannot use its parent's lock


def _groups() -> _GroupCache:
    pid = os.getpid()
    if pid not in _caches:
        _caches.clear()
        _caches[pid] = _GroupCache()
    return _caches[pid]


def _footer(path: Path) -> _Footer:
    stat = path.stat()
    return _cached_footer(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _cached_footer(path: Path, size: int, time: int) -> _Footer:
    metadata, layout = read_footer(path)
    counts = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
    return _Footer((size, time), metadata, layout, [0, *accumulate(counts)])


def _footer_of_reader(path: Path) -> _Footer:
    try:
        return _footer(path)
    except SourceError as error:  # a good file when it was indexed
        raise OSError(str(error)) from None


def _read_group(path: Path, group: int, footer: _Footer) -> Any:
    """The image column of a row group."""
    batches = list(_batches(path, group, footer))
    return pyarrow().chunked_array([batch.column(0) for batch in batches])


def _batches(path: Path, group: int, footer: _Footer, *more: str) -> Iterator[Any]:
    """Image column, and ``more`` columns, of a row group: a record batch for each row.

    Raises:
        OSError: it cannot be decoded. _TooLarge: it unpacks to more than ``UNPACKED_BYTES``.
    """
    parquet, told = pyarrow("parquet"), f"{path}: row group {group}"
    unpacked = _image_bytes(footer, group, UNPACKED_BYTES)
    most = f"at most {UNPACKED_BYTES >> 20} MiB are taken"
    if unpacked > UNPACKED_BYTES:
        raise _TooLarge(f"{told} unpacks to {unpacked >> 20} MiB, {most}")
    unpacked = rows = 0
    try:
        with parquet.ParquetFile(path, metadata=footer.metadata, pre_buffer=False) as file:
            columns = [footer.layout.leaf, *more]
            for batch in file.iter_batches(
                batch_size=1, row_groups=[group], columns=columns, use_threads=False
            ):
                unpacked += batch.nbytes
                if unpacked > UNPACKED_BYTES:
                    raise _TooLarge(f"{told} unpacks to more than its footer says, {most}")
                rows += batch.num_rows
                yield batch
    except _TooLarge:
        raise
    except Exception as error:  # damaged pages make pyarrow raise almost anything
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{told} cannot be decoded ({reason})") from None
    if rows != (expected := footer.metadata.row_group(group).num_rows):
        raise OSError(f"{told} has {rows} rows, its footer says {expected}")


def _group_rows(
    root: Path, file: str, k: int, group: int, measure: Callable[[bytes], tuple[int, int, str]]
) -> Iterator[Row]:
    footer = _footer(root / file)
    layout, start = footer.layout, footer.starts[group]
    more = [layout.label] if layout.label else []
    for i, batch in enumerate(_batches(root / file, group, footer, *more)):
        name = f"{file}/{start + i}"
        try:
            label = layout.name_of(batch.column(layout.label)[0].as_py()) if more else None
        except ValueError as error:
            raise SourceError(f"data: {name} has {error}; write the file again") from None
        try:
            data = _encoded(batch.column(layout.image)[0].as_py())
        except OSError as error:
            yield Row(name, label, 0, k, start + i, 0, 0, str(error))
            continue
        yield Row(name, label, len(data), k, start + i, *measure(data))


def _encoded(value: Any) -> bytes:
    """Bytes of a value of the image column. Its path is a name only and never opened."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        raise OSError("no bytes in the row")
    return bytes(data)


def _group_sizes(footer: _Footer) -> Iterator[tuple[int, int]]:
    """Decoded bytes of the images, and rows, of each row group."""
    for k in range(footer.metadata.num_row_groups):
        yield _image_bytes(footer, k, GROUP_BYTES), footer.metadata.row_group(k).num_rows


def _image_bytes(footer: _Footer, k: int, above: int) -> int:
    """Decoded bytes of the images of row group ``k``; up to ``above`` with other columns."""
    group = footer.metadata.row_group(k)
    size: int = group.total_byte_size
    if size > above:  # pyarrow 26 aborts in ``column`` over some damaged footers
        columns = [group.column(c) for c in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in columns if _is_leaf(c, footer.layout))
    return size


def _is_leaf(column: Any, layout: Layout) -> bool:
    try:
        return bool(column.path_in_schema == layout.leaf)
    except UnicodeDecodeError:  # of a damaged footer; reading the group says so
        return False


def _described(layout: Layout) -> str:
    label = f"the label column {layout.label!r}" if layout.label else "no label column"
    if layout.classes is not None:
        label += f" with {len(layout.classes)} named classes"
    return f"the image column {layout.image!r} and {label}"
