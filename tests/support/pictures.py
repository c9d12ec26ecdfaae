"""Generated images and small sources for the tests of the data path."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """Smooth RGB gradients and a few rectangles: every pixel row and column differs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    phase, slope = rng.uniform(0, 6, 3), rng.uniform(2, 9, (2, 3))
    wave = np.sin(phase + x[..., None] / width * slope[0] + y[..., None] / height * slope[1])
    pixels = np.uint8(127.5 + 120 * wave)
    for _ in range(3):
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        pixels[top : top + height // 4, left : left + width // 4] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def encoded(
    image: Image.Image, format: str = "JPEG", orientation: int = 1, **options: Any
) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif, **options)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def class_folders(root: Path, n: int = 12, classes: int = 3) -> Path:
    """``n`` JPEGs of varying size, ``c0/000.jpg`` and so on."""
    return write(
        root,
        {
            f"c{i % classes}/{i:03d}.jpg": encoded(picture(i, 40 + 5 * (i % 4), 30 + 7 * (i % 3)))
            for i in range(n)
        },
    )


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def special_images() -> dict[str, bytes]:
    """One file for every way in which images differ that a loader must see through."""
    colour = picture(1)
    files = {f"exif{k}.jpg": encoded(picture(10 + k), orientation=k) for k in range(1, 9)}
    return files | {
        "grey.jpg": encoded(colour.convert("L")),
        "cmyk.jpg": encoded(colour.convert("CMYK")),
        "progressive.jpg": encoded(colour, progressive=True),
        "full_chroma.JPEG": encoded(colour, subsampling=0),
        "tiny.jpg": encoded(picture(2, 5, 7)),
        "wide.jpg": encoded(picture(3, 200, 20)),
        "plain.png": encoded(colour, "PNG"),
        "turned.png": encoded(colour, "PNG", orientation=6),
        "alpha.png": encoded(colour.convert("RGBA"), "PNG"),
        "palette.png": encoded(colour.quantize(64), "PNG"),
        "plain.bmp": encoded(colour, "BMP"),
        "lossless.webp": encoded(colour, "WEBP", lossless=True, orientation=8),
        "plain.ppm": encoded(colour, "PPM"),
        "lzw.tif": encoded(colour, "TIFF", compression="tiff_lzw"),
        "turned.tiff": encoded(colour, "TIFF", orientation=3),
    }


def data_folder() -> Path:
    """Folder of the real images: NJEPA_DATA, else shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("NJEPA_DATA", beside))
