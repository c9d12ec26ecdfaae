"""MNIST's and Fashion-MNIST's files: grey images of one size in a row, labels in a second file.

Layout (as on MNIST's page): big-endian uint32 0x00000803, n, rows, columns, then n·rows·columns
bytes; labels: 0x00000801, n, then n bytes. Either may be compressed with gzip.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from PIL import Image

from njepa.data.errors import SourceError

_IMAGES, _LABELS = 0x00000803, 0x00000801
_LARGEST = 1 << 14  # pixels a side; a header that says more is wrong
_MOST = 1 << 24  # images; a few gzipped bytes can stand for as many labels as the header says


class IdxImages:
    """The images of an idx file as PNG, with their labels.

    Args:
        path: the file of the images; that of the labels lies beside it under the same name with
            ``images`` and ``idx3`` replaced by ``labels`` and ``idx1``.

    Raises:
        SourceError: not such a file, no labels beside it, or a number of labels that differs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open(path) as file:
            self.n, self._rows, self._columns = _header(path, file, _IMAGES, 3)
        sides = (self._rows, self._columns)
        if not (all(0 < side <= _LARGEST for side in sides) and 0 < self.n <= _MOST):
            raise SourceError(
                f"data: {path} says that it holds {self.n} images of {self._columns} x "
                f"{self._rows} pixels; expected 1 to {_MOST} images of at most {_LARGEST} a side"
            )
        self.labels = _read_labels(path, self.n)

    def __iter__(self) -> Iterator[tuple[bytes, str]]:
        """PNG and label of each image.

        Raises:
            SourceError: the file has more or fewer bytes than its header says.
        """
        size = self._rows * self._columns
        with _open(self.path) as file:
            _read(self.path, file, 16)
            for k in range(self.n):
                pixels = _read(self.path, file, size)
                if len(pixels) < size:
                    raise SourceError(
                        f"data: {self.path} ends within image {k} of {self.n}; it was cut short: "
                        f"copy it again"
                    )
                buffer = io.BytesIO()
                Image.frombytes("L", (self._columns, self._rows), pixels).save(buffer, "PNG")
                yield buffer.getvalue(), self.labels[k]
            if _read(self.path, file, 1):
                raise SourceError(
                    f"data: {self.path} continues after the {self.n} images of its header; it is "
                    f"damaged: copy it again"
                )


def is_idx(path: Path) -> bool:
    """Whether the name is one of an idx file, such as ``train-images-idx3-ubyte.gz``."""
    return re.search(r"idx\d-ubyte", path.name) is not None


def _read_labels(images: Path, n: int) -> list[str]:
    name = images.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [images.with_name(name), images.with_name(f"{name}.gz")]
    path = next((p for p in beside if p.exists()), None)
    if path is None:
        raise SourceError(
            f"data: no labels beside {images}; expected {name} or {name}.gz in the same folder: "
            f"put it there"
        )
    with _open(path) as file:
        (count,) = _header(path, file, _LABELS, 1)
        labels = _read(path, file, n + 1)
    if count != n or len(labels) != n:
        raise SourceError(
            f"data: {path} has {len(labels)}{' or more' if len(labels) > n else ''} labels and "
            f"says {count}, expected {n}, one for each image of {images.name}; copy both again"
        )
    return [str(label) for label in labels]


def _header(path: Path, file: IO[bytes], magic: int, dimensions: int) -> tuple[int, ...]:
    data = _read(path, file, 4 + 4 * dimensions)
    got = int.from_bytes(data[:4], "big")
    if len(data) >= 4 and got != magic:
        labels = " (that of labels: give the file of the images)" if got == _LABELS else ""
        raise SourceError(
            f"data: {path} begins with 0x{got:08x}{labels}, expected 0x{magic:08x}, an idx file of "
            f"bytes with {dimensions} dimension{'s' if dimensions > 1 else ''}, such as MNIST's "
            f"train-{'images-idx3' if dimensions == 3 else 'labels-idx1'}-ubyte"
        )
    if len(data) < 4 + 4 * dimensions:
        raise SourceError(
            f"data: {path} has {len(data)} bytes, expected the header of an idx file, "
            f"{4 + 4 * dimensions}; it was cut short: copy it again"
        )
    return struct.unpack(f">{dimensions}I", data[4:])


def _open(path: Path) -> IO[bytes]:
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return cast(IO[bytes], gzip.open(path)) if packed else open(path, "rb")
    except OSError as error:
        raise SourceError(f"data: {path} cannot be read: {error.strerror}") from None


def _read(path: Path, file: IO[bytes], size: int) -> bytes:
    try:
        return file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(
            f"data: {path} cannot be unpacked ({error}); it is damaged or was cut short: copy it "
            f"again"
        ) from None
