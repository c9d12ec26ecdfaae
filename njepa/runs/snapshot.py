"""What one rank saves, copied to CPU memory and written from there to a safetensors file.

The format is written here (a length, a JSON header, the bytes) and read by the safetensors library:
a thread beside the training has to write in chunks, between which processes can be forked, with a
checksum of the bytes that pass, without a second copy of them, and to the platters.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from njepa.data.fork_guard import at_work

_CHUNK = 1 << 24
#: Names of the format for the types that a training holds.
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Piece(NamedTuple):
    """A range of a flattened tensor, the whole of it where one rank holds that."""

    key: str
    values: Tensor
    """1-D, on any device; read when the snapshot is taken."""
    start: int
    """Of the range in the flattened tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def whole(self) -> bool:
        return self.values.numel() == torch.Size(self.shape).numel()


class Written(NamedTuple):
    """A file as it must be found again."""

    bytes: int
    crc32: str


class Snapshot:
    """CPU memory for the pieces of a rank, kept from one checkpoint to the next.

    New memory costs more time than the copy into it. It is page-locked where the tensors lie on a
    GPU, and as large as the file that it becomes.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._header = b""
        self.pieces: list[list[object]] = []
        """[key, start, number of values, shape] of all that the last ``take`` copied."""

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self._memory.numel()

    def take(self, pieces: Iterable[Piece], after: torch.cuda.Event | None = None) -> None:
        """Copy the values; when this returns they may change.

        Args:
            after: what a GPU has to do before; the copy then runs beside what follows that.
        """
        # Wide types first: then each tensor lies on a multiple of its own width.
        ordered = sorted(pieces, key=lambda piece: (-piece.values.element_size(), piece.key))
        size = sum(piece.values.nbytes for piece in ordered)
        if size != self.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # never both
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=after is not None)
        header, end = dict[str, object](), 0
        places = list[Tensor]()
        for piece in ordered:
            begin, end = end, end + piece.values.nbytes
            places.append(self._memory[begin:end].view(piece.values.dtype))
            shape = piece.shape if piece.whole else (piece.values.numel(),)
            header[piece.key] = {
                "dtype": _TYPES[piece.values.dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        _copy(places, [piece.values.detach() for piece in ordered], after)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._bytes = memoryview(self._memory.numpy())  # type: ignore[arg-type]
        self.pieces = [[p.key, p.start, p.values.numel(), list(p.shape)] for p in ordered]

    def write(self, path: Path) -> Written:
        """Write what was taken, and read it back from the disk.

        Raises:
            OSError: the disk is full or fails; or it does not hold what was written.
        """
        with open(path, "wb") as file:
            crc = _write(file, [memoryview(self._header), self._bytes])
        written = Written(len(self._header) + len(self._bytes), f"{crc:08x}")
        if read_back(path) != written:
            raise OSError(f"{path} does not hold what was written to it")
        return written


def _copy(places: list[Tensor], values: list[Tensor], after: torch.cuda.Event | None) -> None:
    if after is None:
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
        return
    stream = torch.cuda.Stream(device=after.device)  # the training's own goes on
    stream.wait_event(after)
    with torch.cuda.stream(stream):
        for place, value in zip(places, values, strict=True):
            place.copy_(value, non_blocking=True)
    stream.synchronize()


def write_file(path: Path, text: str) -> Written:
    """A small text file, on the disk when this returns.

    Raises:
        OSError: as of ``Snapshot.write``.
    """
    content = text.encode()
    with open(path, "wb") as file:
        crc = _write(file, [memoryview(content)])
    return Written(len(content), f"{crc:08x}")


def read_back(path: Path) -> Written:
    """Size and checksum of a file, from the disk where the system lets us choose.

    CRC-32 finds damage: every burst of up to 32 bits, and all but one in 4e9 of other errors. It
    keeps nobody out who can write to the folder, and neither would a hash that lies beside the
    files.
    """
    crc, size = 0, 0
    with open(path, "rb", buffering=0) as file:
        with contextlib.suppress(AttributeError, OSError):  # not everywhere
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            crc, size = zlib.crc32(buffer[:count], crc), size + count
    return Written(size, f"{crc:08x}")


def sync_folder(path: Path) -> None:
    """Names in a folder are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(file: object, parts: Sequence[memoryview]) -> int:
    crc = 0
    for part in parts:
        for start in range(0, len(part), _CHUNK):
            chunk = part[start : start + _CHUNK]
            with at_work():
                file.write(chunk)  # type: ignore[attr-defined]
            crc = zlib.crc32(chunk, crc)
    file.flush()  # type: ignore[attr-defined]
    os.fsync(file.fileno())  # type: ignore[attr-defined]
    return crc
