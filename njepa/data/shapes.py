"""The embedded image set ``shapes``: patchwork quilts whose label is the kind of pattern sewn on.

Every image is a quilt of about 20 patches. All patches of one image carry the same kind of pattern
(the class: stripes, rings, bricks, ...), but each patch has its own two colours, polarity, period,
phase and skew. What the label says is therefore present everywhere in the image, while colours and
single pixels say next to nothing about it.

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
_Mask = NDArray[np.bool_]

IMAGE_SIZE = 64  # pixels
SPLIT_SIZES = {"train": 8192, "test": 2048}
SET_NAME = "shapes-v1"  # a new number whenever a pixel or a file name changes
_SEED = 20261
_SPLIT_IDS = {"train": 0, "test": 1}
_MANIFEST = "manifest.json"

_CELL = 16  # side of a patch of the quilt, pixels
_CELLS = IMAGE_SIZE // _CELL + 2  # patches per side, with one to spare for the random offset
_PERIOD = (6, 10)  # pixels
_SKEW = 8  # up to 8/32: a quarter pixel sideways per pixel
_CONTRAST = 88  # least difference of the two colours, in one channel at least, of 255

# A pattern maps pixel coordinates and the period p (int32 arrays of one shape) to a boolean mask.
_Pattern = Callable[[_Ints, _Ints, _Ints], _Mask]


def _centred(x: _Ints, y: _Ints, p: _Ints) -> tuple[_Ints, _Ints]:
    """Coordinates in half pixels from the centre of each p × p tile: odd/even steps in (-p, p)."""
    return 2 * (x % p) - p + 1, 2 * (y % p) - p + 1


def _stripes(t: _Ints, p: _Ints) -> _Mask:
    return t % p < p // 2


def _plus(a: _Ints, b: _Ints, p: _Ints) -> _Mask:
    return ((abs(a) <= p // 4) & (abs(b) < p - 1)) | ((abs(b) <= p // 4) & (abs(a) < p - 1))


def _saltire(a: _Ints, b: _Ints, p: _Ints) -> _Mask:
    near_diagonal: _Mask = np.minimum(abs(a + b), abs(a - b)) <= p // 3 + 1
    return near_diagonal & (np.maximum(abs(a), abs(b)) < p - 1)


def _rings(a: _Ints, b: _Ints, p: _Ints) -> _Mask:
    d = a * a + b * b
    return (d <= p * p) & (d > p * p * 5 // 16)


def _frames(a: _Ints, b: _Ints, p: _Ints) -> _Mask:
    d = np.maximum(abs(a), abs(b))
    return (d < p - 1) & (d >= p // 2)


def _bricks(x: _Ints, y: _Ints, p: _Ints) -> _Mask:
    row = y // (p // 2 + 1)
    joint = y % (p // 2 + 1) < 1
    return joint | ((x + (row % 2) * (p // 2 + 1)) % (p + 2) < 2)


_PATTERNS: dict[str, _Pattern] = {
    "horizontal": lambda x, y, p: _stripes(y, p),
    "vertical": lambda x, y, p: _stripes(x, p),
    "rising": lambda x, y, p: _stripes(x + y, p + p // 2),
    "falling": lambda x, y, p: _stripes(x - y, p + p // 2),
    "zigzag": lambda x, y, p: _stripes(y + abs(x % (2 * p) - p), p),
    "chevron": lambda x, y, p: _stripes(x + abs(y % (2 * p) - p), p),
    "checker": lambda x, y, p: (x // (p // 2) + y // (p // 2)) % 2 == 0,
    "grid": lambda x, y, p: np.minimum(x % p, y % p) < p // 4 + (p > 7),
    "bricks": _bricks,
    "discs": lambda x, y, p: np.square(_centred(x, y, p)).sum(0) <= p * p * 9 // 16,
    "rings": lambda x, y, p: _rings(*_centred(x, y, p), p),
    "frames": lambda x, y, p: _frames(*_centred(x, y, p), p),
    "triangles": lambda x, y, p: (abs(_centred(x, y, p)[0]) <= y % p) & (y % p < p - 1),
    "plus": lambda x, y, p: _plus(*_centred(x, y, p), p),
    "saltire": lambda x, y, p: _saltire(*_centred(x, y, p), p),
    "dashes": lambda x, y, p: (y % (p // 2) < p // 4) & ((x + y // (p // 2) * 3) % p < p * 5 // 8),
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

    # which patch of the quilt a pixel belongs to; rows of patches are shifted against each other
    row = (yy + draw.ints(0, _CELL - 1, 1)) // _CELL
    column = (xx + draw.ints(0, _CELL - 1, _CELLS)[row]) // _CELL

    def per_patch(low: int, high: int, *extra: int) -> _Ints:
        values: _Ints = draw.ints(low, high, _CELLS, _CELLS, *extra)[row, column]
        return values

    period = per_patch(*_PERIOD)
    x = xx + per_patch(0, 63)
    y = yy + per_patch(0, 63)
    x, y = x + ((y * per_patch(-_SKEW, _SKEW)) >> 5), y + ((x * per_patch(-_SKEW, _SKEW)) >> 5)
    mask = _PATTERNS[class_of(index)](x, y, period)

    # second colour: some channels (1 to 7 as bits) moved around the circle of 256 values
    first = per_patch(0, 255, 3)
    moved = (per_patch(1, 7)[..., None] >> np.arange(3)) & 1
    second = (first + moved * per_patch(_CONTRAST, 256 - _CONTRAST, 3)) % 256
    swapped = per_patch(0, 1) == 1
    return np.where((mask ^ swapped)[..., None], second, first).astype(np.uint8)


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
    manifest = {"set": SET_NAME, "files": _expected_counts(), "pixels_sha256": digest.hexdigest()}
    (root / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    if progress:
        print(f"shapes: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _expected_counts() -> dict[str, int]:
    """``{"train/rings": 512, ...}``."""
    counts: dict[str, int] = {}
    for split, size in SPLIT_SIZES.items():
        for index, name in enumerate(CLASSES):
            counts[f"{split}/{name}"] = len(range(index, size, len(CLASSES)))
    return counts


def _is_complete(root: Path) -> bool:
    """Whether the manifest is ours and every class folder holds its number of non-empty files."""
    try:
        manifest = json.loads((root / _MANIFEST).read_text())
        if manifest.get("set") != SET_NAME or manifest.get("files") != _expected_counts():
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
