"""Scenes with known masks, drawn from the embedded set: a disc of one pattern on another one.

Image i of the set is the background, another image of a different class shows through a disc. In a
clip the disc moves with its pattern over the background, which stands still. Pixels and places are
functions of (split, i) alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from njepa.data.eval_views import central_view
from njepa.data.shapes import CLASSES, IMAGE_SIZE, SPLIT_SIZES, render
from njepa.draws.streams import uniform

FRAMES = 8
_SEEDS = {"train": 0, "test": 1}
_RADIUS = (14, 20)  # pixels of 64
_STEP = 2  # pixels that the disc moves from frame to frame, in x and in y


@dataclass(frozen=True)
class Scenes:
    """Clips of ``frames`` images: uint8 [n, T, 3, S, S] with masks of the disc."""

    images: Tensor
    inside: Tensor
    """bool [n, T, S, S]: the disc."""
    classes: Tensor
    """int64 [n, 2]: class of the background and of the disc."""

    def patch_labels(self, patch: int) -> Tensor:
        """Class of most pixels of each patch, int64 [n, T, N]."""
        share = _patches(self.inside.float(), patch).mean(-1)
        background, disc = (c[:, None, None] for c in self.classes.unbind(1))
        return torch.where(share >= 0.5, disc, background)

    def patch_masks(self, patch: int) -> Tensor:
        """Share of the disc in each patch, float32 [n, T, N]."""
        return _patches(self.inside.float(), patch).mean(-1)


def _patches(x: Tensor, patch: int) -> Tensor:
    """[..., S, S] to [..., N, patch²], row by row as the encoder counts them."""
    cut = x.unfold(-2, patch, patch).unfold(-2, patch, patch)
    return cut.flatten(-4, -3).flatten(-2)


def scenes(split: str, n: int, image_size: int, frames: int = 1) -> Scenes:
    """``n`` clips of the split ``train`` or ``test``, seen as every probe sees images."""
    images = torch.empty(n, frames, 3, image_size, image_size, dtype=torch.uint8)
    inside = torch.empty(n, frames, image_size, image_size, dtype=torch.bool)
    classes = torch.empty(n, 2, dtype=torch.int64)
    draws = uniform(_SEEDS[split], "scene", 0, np.arange(n, dtype=np.int64), 5)
    for i, (radius, y, x, partner, way) in enumerate(draws):
        # Classes take turns, so a distance that 16 does not divide gives another class.
        distance = 1 + int(partner * (len(CLASSES) - 1))
        other = (i + distance) % SPLIT_SIZES[split]
        classes[i] = torch.tensor([i % len(CLASSES), other % len(CLASSES)])
        r = _RADIUS[0] + radius * (_RADIUS[1] - _RADIUS[0])
        room = IMAGE_SIZE - 2 * r - _STEP * (frames - 1)
        centre = np.array([r + y * room, r + x * room])
        signs = np.array([1 if int(4 * way) & bit else -1 for bit in (1, 2)])
        centre += np.where(signs < 0, _STEP * (frames - 1), 0)  # room on the side it moves to
        background, disc = render(split, i), render(split, other)
        for t in range(frames):
            moved = signs * _STEP * t
            mask = _disc(centre + moved, r)
            shown = np.where(mask[..., None], np.roll(disc, tuple(moved), (0, 1)), background)
            images[i, t] = central_view(_chw(shown), image_size)
            grey = np.repeat(np.uint8(255) * mask[..., None], 3, axis=2)
            inside[i, t] = central_view(_chw(grey), image_size)[0] >= 128
    return Scenes(images, inside, classes)


def _disc(centre: npt.NDArray[np.float64], radius: float) -> npt.NDArray[np.bool_]:
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5
    mask: npt.NDArray[np.bool_] = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
    return mask


def _chw(pixels: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
