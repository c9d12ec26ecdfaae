"""The index of a source: names, sizes and labels of the images whose header can be read."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from njepa.data import parquet
from njepa.data.decode import fault, open_image
from njepa.data.errors import SourceError
from njepa.data.listing import EXPECTED, Entries, Source, list_entries

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

_HEAD = 1 << 16  # bytes of a shard member that hold the header of almost every image
_CHUNK = 32  # headers that a thread reads at a time: a million files are not a million tasks
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclass(frozen=True)
class ImageIndex:
    """Readable images of a source; the sample id is the position here."""

    root: Path
    names: list[str]
    widths: Int32Array
    """Pixels, after the EXIF orientation, [n]; ``heights`` too."""
    heights: Int32Array
    sizes: Int64Array
    """Encoded bytes, [n]."""
    labels: Int64Array | None
    """Class numbers, [n]; for evaluation only. None: no labels, or a single class."""
    classes: list[str]
    shards: list[str]
    """Tar or Parquet files relative to ``root``; empty for a folder or a list."""
    shard: Int64Array
    """Which of ``shards``, [n]; -1: a file of its own."""
    offsets: Int64Array
    """First byte in the tar file, or row in the Parquet file, [n]."""
    unreadable: list[str]
    """Images whose header could not be read, with the reason; they have no sample id."""
    digest: str
    """SHA-256 over names, byte and pixel sizes and labels."""

    @property
    def n(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """Name of sample ``i`` relative to the source; for a shard ``file.tar/member``,
        for Parquet ``file.parquet/row``."""
        return self.names[i]

    def shape(self, i: int) -> tuple[int, int]:
        """Width and height of sample ``i``, upright."""
        return int(self.widths[i]), int(self.heights[i])

    def path(self, i: int) -> Path | None:
        """The file of sample ``i``; None where it is part of a shard."""
        return None if self.shards else self.root / self.names[i]

    def read(self, i: int, limit: int = -1) -> bytes:
        """Encoded bytes of sample ``i`` (the first ``limit`` of them).

        Raises:
            OSError: the file cannot be read.
        """
        if not self.shards:
            with open(self.root / self.names[i], "rb") as file:
                return file.read(limit)
        shard = self.root / self.shards[self.shard[i]]
        size = int(self.sizes[i])
        if shard.suffix.lower() == ".parquet":
            return parquet.read_row(shard, int(self.offsets[i]))[: None if limit < 0 else limit]
        return _read_at(shard, int(self.offsets[i]), size if limit < 0 else min(size, limit))

    def labels_in(self, classes: list[str]) -> Int64Array | None:
        """``labels`` numbered as in ``classes`` (those of another index); -1: not among them."""
        if self.labels is None:
            return None
        number = {name: k for k, name in enumerate(classes)}
        return np.array([number.get(name, -1) for name in self.classes], np.int64)[self.labels]


@dataclass(frozen=True)
class Known:
    """Headers that were read before: those of files with the same size and time hold."""

    index: ImageIndex
    times: Int64Array
    """Modification times of its files in ns, [n]; empty for shards."""

    def of(self, source: Source) -> tuple[Int32Array, Int32Array]:
        """Widths and heights of the files of ``source``; 0 where they must be read."""
        if not len(self.times):
            return (np.zeros(len(source.files), np.int32),) * 2
        index = self.index
        row = {name: i for i, name in enumerate(index.names)}
        rows = np.array([row.get(name, -1) for name in source.files], np.int64)
        same = (rows >= 0) & (index.sizes[rows] == source.sizes)
        same &= self.times[rows] == source.times
        return index.widths[rows] * same, index.heights[rows] * same


def build_index(source: Source, progress: bool, known: Known | None = None) -> ImageIndex:
    """Read the header of every image of ``source``.

    Args:
        progress: show bars, where stderr is a terminal.
        known: an earlier index of the source; what it knows of files is not read again.

    Raises:
        SourceError: none is readable.
    """
    quiet = None if progress else True  # tqdm: None is quiet where stderr is no terminal
    parquet_rows = source.kind == "parquet"
    entries, read = _parquet(source, quiet) if parquet_rows else _headers(source, quiet, known)
    total = len(entries.names)
    shards = source.files if source.kind in ("shards", "parquet") else []
    widths = np.array([w for w, _, _ in read], dtype=np.int32)
    heights = np.array([h for _, h, _ in read], dtype=np.int32)
    good = np.flatnonzero(widths)
    unreadable = [f"{entries.names[i]} ({read[i][2]})" for i in np.flatnonzero(widths == 0)]
    if len(good) == 0:
        raise SourceError(
            f"data: none of the {total} images of {source.path} is readable: "
            f"{'; '.join(unreadable[:5])}. {EXPECTED}"
        )
    classes, labels = _classes(entries, good)
    names = [entries.names[i] for i in good]
    return ImageIndex(
        source.root, names, widths[good], heights[good], entries.sizes[good], labels, classes,
        shards, entries.shard[good], entries.offsets[good], unreadable,
        _digest(names, entries.sizes[good], widths[good], heights[good], labels, classes),
    )  # fmt: skip


_Size = tuple[int, int, str]  # width, height, why it is unreadable


def _headers(
    source: Source, quiet: bool | None, known: Known | None
) -> tuple[Entries, list[_Size]]:
    shards = source.files if source.kind == "shards" else []
    none = quiet if shards else True
    bar = tqdm(range(len(shards)), "reading tar headers", unit="shard", disable=none)
    entries = list_entries(source, bar)
    read: list[_Size] = [(0, 0, "")] * len(entries.names)
    if known is not None and not shards:
        read = [(w, h, "") for w, h in zip(*(a.tolist() for a in known.of(source)), strict=True)]
    unknown = [i for i, (width, _, _) in enumerate(read) if not width]

    def header(i: int) -> _Size:
        shard, offset, size = (int(a[i]) for a in (entries.shard, entries.offsets, entries.sizes))
        if shard < 0 and size < 0:
            return 0, 0, "no such file, or none to read from (a pipe, a device)"
        if shard < 0:
            return measure(source.root / entries.names[i], size)
        try:
            file = source.root / shards[shard]
            head = measure(_read_at(file, offset, min(_HEAD, size)), size)
            if not head[2] or size <= _HEAD:
                return head
            return measure(_read_at(file, offset, size), size)  # cut inside the header?
        except OSError as error:
            return 0, 0, fault(error, size)

    def headers(chunk: list[int]) -> list[_Size]:
        return [header(i) for i in chunk]

    chunks = [unknown[i : i + _CHUNK] for i in range(0, len(unknown), _CHUNK)]
    shown = tqdm(desc="reading image sizes", total=len(unknown), unit="img", disable=quiet)
    with shown, ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        for chunk, sizes in zip(chunks, pool.map(headers, chunks), strict=True):
            for i, size in zip(chunk, sizes, strict=True):
                read[i] = size
            shown.update(len(chunk))
    return entries, read


def _parquet(source: Source, quiet: bool | None) -> tuple[Entries, list[_Size]]:
    parquet.check(source.path, source.root, source.files)
    rows = parquet.read_rows(
        source.root, source.files, lambda data: measure(data, len(data)), quiet
    )
    labels = [row.label for row in rows if row.label is not None]
    numbers = np.array([(r.size, r.file, r.row) for r in rows], dtype=np.int64)
    sizes, files, places = np.ascontiguousarray(numbers.T)
    entries = Entries([row.name for row in rows], labels or None, sizes, files, places)
    return entries, [(row.width, row.height, row.fault) for row in rows]


def measure(file: Path | bytes, size: int) -> _Size:
    """Upright width and height from the header, or 0, 0 and what is wrong with the image."""
    try:
        return *_upright_size(file), ""
    except Exception as error:  # damaged files make Pillow raise almost anything
        return 0, 0, fault(error, size)


def _upright_size(file: Path | bytes) -> tuple[int, int]:
    """(width, height) after the EXIF orientation, from the header alone."""
    with open_image(file) as image:
        width, height = image.size
        # A TIFF has its orientation in ``size`` already; getexif of a PNG without EXIF would
        # decode the whole image.
        if image.format != "TIFF" and "exif" in image.info:
            orientation = image.getexif().get(_ORIENTATION)
            if orientation in _SIDEWAYS:
                return height, width
        return width, height


def _classes(entries: Entries, good: Int64Array) -> tuple[list[str], Int64Array | None]:
    if entries.labels is None:
        return [], None
    of_image = [entries.labels[i] for i in good]
    distinct = set(of_image)
    numeric = all(name.isdecimal() for name in distinct)
    classes = sorted(distinct, key=(lambda c: (int(c), c)) if numeric else None)
    if len(classes) < 2:
        return [], None
    number = {name: k for k, name in enumerate(classes)}
    return classes, np.array([number[name] for name in of_image], dtype=np.int64)


def _digest(names: list[str], sizes: Int64Array, widths: Int32Array, heights: Int32Array,
            labels: Int64Array | None, classes: list[str]) -> str:  # fmt: skip
    digest = hashlib.sha256(os.fsencode("\n".join([*names, "", *classes])))
    for array in (sizes, widths, heights, labels):
        if array is not None:
            digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


def _read_at(file: Path, offset: int, size: int) -> bytes:
    with open(file, "rb", buffering=0) as shard:
        data = os.pread(shard.fileno(), size, offset)
    if len(data) != size:
        raise OSError(f"{file} ends before byte {offset + size}")
    return data
