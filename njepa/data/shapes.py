"""The embedded image set ``shapes``: a pattern drawn in light and shade on a coloured mosaic.

Every image is one repeated pattern (the class: stripes, rings, bricks, ...) of two shades, seen
through a mosaic of small tiles whose colours are drawn independently of each other and add nothing
to the brightness. The pattern runs through the whole image, so any part of it can be predicted from
the rest; no tile's colour can. The colours carry nearly all of the contrast and nothing of the
label; the position, size and skew of the pattern vary from image to image.

Pixels are made of raw PCG64 words and integer arithmetic only, so they are the same on every
machine; JPEG bytes may differ between versions of the JPEG library. Labels are folder names; the
trainer never reads them except to evaluate.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_Ints = NDArray[np.int32]

IMAGE_SIZE = 64  # pixels
SPLIT_SIZES = {"train": 8192, "test": 2048}
SET_NAME = "shapes-v1"  # a new number whenever a pixel or a file name changes
_SEED = 20261
_SPLIT_IDS = {"train": 0, "test": 1}
_MANIFEST = "manifest.json"

_TILE = 6  # side of a tile of the mosaic, pixels
_TILES = IMAGE_SIZE // _TILE + 2  # tiles per side, with one to spare for the random offset
_COLOUR = 108  # a tile's colour channels differ from grey by up to this, before the mean is removed
_SHADE = (40, 50)  # the pattern is this much lighter or darker than grey, of 255
_PERIOD = (256, 512)  # of the pattern, in 1/32 pixel: 8 to 16 pixels
_SKEW = 12  # up to 12/32 of a pixel sideways per pixel

# A pattern maps coordinates x, y (int32 arrays) and its period p, all in 1/32 pixel, to a height
# map (int32). The higher half of the pixels is drawn light, the lower half dark: every class
# covers exactly half of the image, so that the share of light pixels says nothing about it.
_Pattern = Callable[[_Ints, _Ints, int], _Ints]


def _wave(t: _Ints, p: int) -> _Ints:
    """Triangle wave of period p between -p/4 and p/4."""
    height: _Ints = abs(t % p - p // 2) - p // 4
    return height


def _centred(x: _Ints, y: _Ints, p: int) -> tuple[_Ints, _Ints]:
    """Distances |a|, |b| from the centre of each p × p square."""
    return abs(x % p - p // 2), abs(y % p - p // 2)


def _bricks(x: _Ints, y: _Ints, p: int) -> _Ints:
    a, b = _centred(x + y // p % 2 * p, 2 * y, 2 * p)
    return np.maximum(a - p // 2, b // 2)


def _basket(x: _Ints, y: _Ints, p: int) -> _Ints:
    side = p * 3 // 2
    return np.where((x // side + y // side) % 2 == 0, _wave(x, side // 2), _wave(y, side // 2))


def _round(x: _Ints, y: _Ints, p: int, radius: int) -> _Ints:
    """Highest where the squared distance from the centre of a p × p square is radius squared."""
    a, b = _centred(x, y, p)
    height: _Ints = np.negative(abs(a * a + b * b - radius * radius))
    return height


def _square(x: _Ints, y: _Ints, p: int, radius: int) -> _Ints:
    height: _Ints = np.negative(abs(np.maximum(*_centred(x, y, p)) - radius))
    return height


_PATTERNS: dict[str, _Pattern] = {
    "horizontal": lambda x, y, p: _wave(y, p),
    "vertical": lambda x, y, p: _wave(x, p),
    "rising": lambda x, y, p: _wave(x + y, p * 3 // 2),
    "falling": lambda x, y, p: _wave(x - y, p * 3 // 2),
    "zigzag": lambda x, y, p: _wave(y + _wave(x, 2 * p), p),
    "chevrons": lambda x, y, p: _wave(x + _wave(y, 2 * p), p),
    "checker": lambda x, y, p: _wave(x, p) * _wave(y, p),
    "diamonds": lambda x, y, p: _wave(x, p) + _wave(y, p),
    "grid": lambda x, y, p: np.maximum(_wave(x, p), _wave(y, p)),
    "bricks": _bricks,
    "staggered": lambda x, y, p: _wave(x + y // p * (p // 2), p),
    "basket": _basket,
    "discs": lambda x, y, p: _round(x, y, p, 0),
    "rings": lambda x, y, p: _round(x, y, p, p * 11 // 32),
    "frames": lambda x, y, p: _square(x, y, p, p * 3 // 10),
    "triangles": lambda x, y, p: y % p - 2 * abs(x % p - p // 2),
}
CLASSES = tuple(_PATTERNS)


class _Draws:
    """Integers from raw PCG64 words, whose stream NumPy guarantees (unlike its distributions)."""

    def __init__(self, split: str, index: int) -> None:
        self._bits = np.random.PCG64([_SEED, _SPLIT_IDS[split], index])

    def ints(self, low: int, high: int, *shape: int) -> _Ints:
        """int32 in [low, high], both included, of the given shape."""
        words = self._bits.random_raw(int(np.prod(shape))).reshape(shape) >> np.uint64(32)
        return low + ((words * np.uint64(high - low + 1)) >> np.uint64(32)).astype(np.int32)

    def one(self, low: int, high: int) -> int:
        return int(self.ints(low, high, 1)[0])


def class_of(index: int) -> str:
    """Class of the image with this index: the classes take turns."""
    return CLASSES[index % len(CLASSES)]


def render(split: str, index: int) -> NDArray[np.uint8]:
    """Pixels uint8 ``[64, 64, 3]`` of image ``index`` of ``split``, before JPEG coding.

    Raises:
        ValueError: unknown split, or an index outside it.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"shapes: split must be one of {sorted(SPLIT_SIZES)}, got {split!r}")
    if not 0 <= index < SPLIT_SIZES[split]:
        raise ValueError(f"shapes: index must be in [0, {SPLIT_SIZES[split]}), got {index}")
    draw = _Draws(split, index)
    yy, xx = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.int32)

    x = 32 * (xx + draw.one(0, 255)) + draw.one(-_SKEW, _SKEW) * yy
    y = 32 * (yy + draw.one(0, 255)) + draw.one(-_SKEW, _SKEW) * xx
    heights = _PATTERNS[class_of(index)](x, y, draw.one(*_PERIOD))
    mask = np.zeros(heights.size, dtype=bool)
    mask[np.argsort(heights, axis=None, kind="stable")[heights.size // 2 :]] = True
    shade = draw.one(*_SHADE)
    brightness = np.where(mask.reshape(heights.shape), 128 + shade, 128 - shade)

    colours = draw.ints(-_COLOUR, _COLOUR, _TILES, _TILES, 3)
    colours -= colours.sum(-1, keepdims=True, dtype=np.int32) // 3
    row = (yy + draw.one(0, _TILE - 1)) // _TILE
    column = (xx + draw.ints(0, _TILE - 1, _TILES)[row]) // _TILE  # every row has its own offset
    pixels: NDArray[np.int32] = brightness[..., None] + colours[row, column]
    return pixels.clip(0, 255).astype(np.uint8)


def ensure_shapes(cache_dir: Path, progress: bool = True) -> tuple[Path, Path]:
    """Folders ``(train, test)`` of the set below ``cache_dir``, rendered first if need be.

    Files are ``<cache_dir>/shapes-v1/{train,test}/<class>/<index>.jpg``. A complete set is left
    untouched; an incomplete one is rendered afresh in a temporary folder that takes its place when
    it is done, so that a reader never sees half a set. Several processes may call this at once:
    one renders, the others wait.

    Args:
        cache_dir: created if missing.
        progress: say on stderr that rendering starts and how long it took.

    Raises:
        OSError: the folder cannot be written.
    """
    cache_dir = Path(cache_dir)
    final = cache_dir / SET_NAME
    folders = final / "train", final / "test"
    if _is_complete(final):
        return folders
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir / f".{SET_NAME}.lock"):
        if _is_complete(final):  # another process rendered it while this one waited
            return folders
        temporary = Path(tempfile.mkdtemp(prefix=f".{SET_NAME}.", dir=cache_dir))
        try:
            _render_all(temporary, progress)
            if final.exists():
                final.rename(temporary / "replaced")
            temporary_final = temporary / SET_NAME
            temporary_final.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folders


def _render_all(folder: Path, progress: bool) -> None:
    total = sum(SPLIT_SIZES.values())
    if progress:
        print(f"shapes: rendering {total} images (once) ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    root = folder / SET_NAME
    digest = hashlib.sha256()
    for split, size in SPLIT_SIZES.items():
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
        for index in range(size):
            pixels = render(split, index)
            digest.update(pixels.tobytes())
            path = root / split / class_of(index) / f"{index:05d}.jpg"
            Image.fromarray(pixels).save(path, quality=90, subsampling=0)  # 4:4:4
    manifest = _expected_manifest() | {"pixels_sha256": digest.hexdigest()}
    (root / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    if progress:
        print(f"shapes: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _expected_manifest() -> dict[str, object]:
    """Name, number of files per class folder, and a hash of one image per class and split.

    The hash is what tells a cache written by another version of this file.
    """
    counts: dict[str, int] = {}
    digest = hashlib.sha256()
    for split, size in SPLIT_SIZES.items():
        for index, name in enumerate(CLASSES):
            counts[f"{split}/{name}"] = len(range(index, size, len(CLASSES)))
            digest.update(render(split, index).tobytes())
    return {"set": SET_NAME, "files": counts, "fingerprint": digest.hexdigest()}


def _is_complete(root: Path) -> bool:
    """Whether the manifest is ours and every class folder holds its number of non-empty files."""
    expected = _expected_manifest()
    try:
        manifest = json.loads((root / _MANIFEST).read_text())
        if any(manifest.get(key) != value for key, value in expected.items()):
            return False
        for folder, count in manifest["files"].items():
            with os.scandir(root / folder) as entries:
                if sum(e.name.endswith(".jpg") and e.stat().st_size > 0 for e in entries) != count:
                    return False
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, AttributeError):
        return False
    return True


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system frees if the process dies; a no-op without fcntl."""
    try:
        import fcntl
    except ImportError:  # not POSIX: the renames alone keep the set whole
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
