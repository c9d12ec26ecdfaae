"""Bytes to upright RGB pixels, and the resize that training and evaluation share."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from njepa.data.errors import DecodeError

#: What Pillow may take a file for, whatever its name says. Not among them: what it hands to other
#: programs (EPS, to Ghostscript), and thirty rare formats that images of a data set do not have.
#: JPEG includes MPO.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def open_image(file: Path | bytes) -> ImageFile.ImageFile:
    """The header of an image by Pillow, which decodes nothing yet.

    Raises:
        Exception: almost any, of a damaged file or one with more than 179 million pixels.
    """
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)


def decode(data: bytes) -> Tensor:
    """uint8 [3, H, W], RGB, turned upright as the EXIF orientation says.

    JPEG by torchvision (it releases the GIL), everything else, and what torchvision refuses, by
    Pillow; both give the same pixels. Grey and CMYK images are converted, transparency is dropped,
    16 bits become 8. PNG never goes to torchvision: a damaged one crashes the process there
    (seen with 0.29).

    Raises:
        DecodeError: not an image, or cut short.
    """
    if data[:2] == b"\xff\xd8":
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
