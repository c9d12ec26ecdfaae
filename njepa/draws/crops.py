"""Crop windows and flips: pure functions of (seed, epoch, sample id) and the image's size.

The rule of torchvision's RandomResizedCrop (Inception crop), for a whole batch at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from njepa.draws.streams import uniform

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

_TRIES = 10


def crop_windows(
    seed: int,
    epoch: int,
    ids: Int64Array,
    widths: Int64Array | Int32Array,
    heights: Int64Array | Int32Array,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Int64Array:
    """One window per sample, int64 [n, 4]: left, top, width, height in pixels of the upright image.

    Area = (width·height)·U(scale), aspect w/h = exp U(ln ratio), place uniform among the fitting
    ones; the first of ten tries that fits wins, otherwise the largest central window whose aspect
    lies in ``ratio``. Draws: stream "crop", words 4t to 4t+3 of try t = area, aspect, left, top.

    Args:
        ids: sample ids, int64 [n]. widths, heights: after the EXIF orientation, [n], >= 1.
        scale: fraction of the area (low, high). ratio: width over height (low, high).
    """
    width = np.asarray(widths, dtype=np.int64)[:, None]
    height = np.asarray(heights, dtype=np.int64)[:, None]
    draws = uniform(seed, "crop", epoch, ids, 4 * _TRIES).reshape(len(ids), _TRIES, 4)
    area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * draws[..., 1])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    left = np.floor(draws[..., 2] * (width - w + 1)).astype(np.int64)
    top = np.floor(draws[..., 3] * (height - h + 1)).astype(np.int64)
    first = fits.argmax(axis=1)[:, None]
    tried = np.stack([np.take_along_axis(x, first, axis=1)[:, 0] for x in (left, top, w, h)], 1)
    return np.where(fits.any(axis=1)[:, None], tried, _central(width, height, ratio))


def _central(width: Int64Array, height: Int64Array, ratio: tuple[float, float]) -> Int64Array:
    w = np.minimum(width, np.maximum(1, np.rint(height * ratio[1]))).astype(np.int64)
    h = np.minimum(height, np.maximum(1, np.rint(width / ratio[0]))).astype(np.int64)
    return np.concatenate([(width - w) // 2, (height - h) // 2, w, h], axis=1)


def flips(seed: int, epoch: int, ids: Int64Array, p: float) -> npt.NDArray[np.bool_]:
    """Whether each sample is mirrored left-right, bool [n]; true with probability ``p``."""
    return uniform(seed, "flip", epoch, ids, 1)[:, 0] < p
