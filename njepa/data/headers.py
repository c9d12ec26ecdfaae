"""Whether DALI can read the header of an image, seen in a few microseconds.

DALI 2.4 may crash the process over a header that it cannot read: with larger batches one of its
threads throws while others still work on what it takes along.
"""

from __future__ import annotations

import struct

from njepa.data.decode import jpeg_size
from njepa.data.index import measure

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
#: What else it decodes like Pillow: WebP, BMP, PPM. It has no GIF, and other pixels for some TIFF.
_OTHERS = (b"RIFF", b"BM", b"P5", b"P6")


def header_holds(data: bytes, width: int, height: int) -> bool:
    """Whether it is a format that DALI decodes like Pillow, of this (upright) size.

    Of a JPEG the segments up to the frame are looked at, of a PNG all chunks: what DALI reads.
    """
    try:
        if data.startswith(_JPEG):
            return {*jpeg_size(data)} == {width, height}  # EXIF may exchange them
        if data.startswith(_PNG):
            return {*_png_size(data)} == {width, height}
    except struct.error:  # it ends before
        return False
    return data.startswith(_OTHERS) and measure(data, len(data)) == (width, height, "")


def _png_size(data: bytes) -> tuple[int, ...]:
    at = len(_PNG)
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + length
    return struct.unpack_from(">II", data, 16) if at <= len(data) else ()
