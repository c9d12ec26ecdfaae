"""Bytes to upright RGB pixels, and the resize that training and evaluation share."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from njepa.data.errors import DecodeError

#: What Pillow may take a file for, whatever its name says. Not among them: what it hands to other
#: programs (EPS, to Ghostscript), and thirty rare formats that images of a data set do not have.
#: JPEG includes MPO.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Markers of a JPEG behind which its size stands: not tables, an extension, arithmetic.
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
#: Those without a length: a decoder goes on right behind them. None of them belongs before a frame.
_ALONE = {0x01, *range(0xD0, 0xDA)}
#: Pixels of a reduced JPEG for each pixel of the resized window, at least, along a side.
SPARE = 2
#: Of a side. Decoding at 1/2 saves no time: Pillow, which can do it, is slower than torchvision.
SCALES = (8, 4)


def open_image(file: Path | bytes) -> ImageFile.ImageFile:
    """The header of an image by Pillow, which decodes nothing yet.

    Raises:
        Exception: almost any, of a damaged file or one with more than 179 million pixels.
    """
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width of a JPEG as it is stored, from the segments up to its frame.

    0, 0 where it does not say that in plain order, or ends before.
    """
    at = 2
    while data[at : at + 1] == b"\xff" and at + 9 <= len(data):
        marker = data[at + 1]
        if marker in _ALONE:
            break
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0


def _fits(data: bytes) -> bool:
    """Whether a JPEG has no more pixels than Pillow takes.

    torchvision has no such limit: 400 bytes can declare, and then take, 12 GB.
    """
    return bool(0 < math.prod(jpeg_size(data)) <= 2 * (Image.MAX_IMAGE_PIXELS or math.inf))


def decode(data: bytes) -> Tensor:
    """uint8 [3, H, W], RGB, turned upright as the EXIF orientation says.

    JPEG by torchvision (it releases the GIL), everything else, and what torchvision refuses, by
    Pillow; both give the same pixels. Grey and CMYK images are converted, transparency is dropped,
    16 bits become 8. PNG never goes to torchvision: a damaged one crashes the process there
    (seen with 0.29).

    Raises:
        DecodeError: not an image, or cut short.
    """
    if data[:2] == b"\xff\xd8" and _fits(data):
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            image: Tensor = decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
            return image
        except RuntimeError:
            pass  # Pillow has the last word, and the clearer message
    try:
        with open_image(data) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16"):  # Pillow would clip at 255
                upright = Image.fromarray(np.uint8(np.rint(np.asarray(upright) / 257)))
            pixels = np.array(upright.convert("RGB"))
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise DecodeError(fault(error, len(data))) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decode_window(
    data: bytes, shape: tuple[int, int], window: Sequence[int], size: int, *, reduce: bool
) -> Tensor:
    """The window of an image, resized: uint8 [3, size, size].

    Args:
        shape: width and height of the upright image, as it was indexed.
        window: left, top, width, height in it.
        reduce: decode a JPEG at 1/4 or 1/8 of its size, by fewer coefficients of its blocks, where
            at least ``SPARE * size`` pixels remain a side of the window.

    Raises:
        DecodeError: as ``decode``; or the image has another shape.
    """
    if reduce and data[:2] == b"\xff\xd8" and min(window[2:]) >= SCALES[-1] * SPARE * size:
        view = _reduced_window(data, shape, window, size)
        if view is not None:
            return view
    image = decode(data)
    check_shape((image.shape[2], image.shape[1]), shape)
    left, top, width, height = window
    return resize(image[:, top : top + height, left : left + width], size, size)


def check_shape(found: tuple[int, int], indexed: tuple[int, int]) -> None:
    """Hold width and height against those of the index.

    Raises:
        DecodeError: they differ.
    """
    if found != indexed:
        raise DecodeError(
            f"has {found[0]} x {found[1]} pixels, {indexed[0]} x {indexed[1]} when it was indexed"
        )


def _reduced_window(
    data: bytes, shape: tuple[int, int], window: Sequence[int], size: int
) -> Tensor | None:
    """None where this JPEG has no such scale or is damaged; decoding it whole will tell."""
    left, top, width, height = window
    wanted = next(s for s in SCALES if min(width, height) >= s * SPARE * size)
    try:
        with open_image(data) as opened:
            full = opened.size
            opened.draft(None, (full[0] // wanted, full[1] // wanted))
            scale = round(full[0] / opened.width)
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
            # Of a last row or column that is cut off, a turned image would make the first.
            cut = full[0] % scale or full[1] % scale
            upright = ImageOps.exif_transpose(opened).convert("RGB")
            expected = tuple(-(-x // scale) for x in shape)
            if scale == 1 or (turned and cut) or upright.size != expected:
                return None
            box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
            pixels = np.array(upright.resize((size, size), Image.Resampling.BILINEAR, box))
    except Exception:  # damaged files make Pillow raise almost anything
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def fault(error: Exception, size: int) -> str:
    """What is wrong with an encoded image of ``size`` bytes, in a few words."""
    if size == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return " ".join(str(error).split()) or type(error).__name__


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, antialiased; uint8 [3, H, W] to uint8 [3, height, width]."""
    if image.shape[1:] == (height, width):
        return image.contiguous()
    # channels_last takes torch's vectorised uint8 path.
    batch = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size=(height, width), mode="bilinear", antialias=True)[0]
