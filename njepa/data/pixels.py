"""What the two backends share: which window of which image, and the form of what they deliver."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from njepa.config import DataConfig
from njepa.data.index import ImageIndex
from njepa.draws.crops import crop_windows, flips
from njepa.draws.order import Planned


class Pixels(NamedTuple):
    """One micro-batch of images."""

    images: Tensor
    """uint8 [B, S, S, 3], contiguous."""
    ids: npt.NDArray[np.int64]
    """[B]: the planned samples whose windows these are."""
    unreadable: list[tuple[int, str]]
    """Sample ids that were replaced by others, with the reason."""


class PixelSource(Protocol):
    """A backend: the pixels of consecutive micro-steps."""

    def __next__(self) -> Pixels: ...

    def close(self) -> None: ...


def planned_views(
    config: DataConfig, seed: int, index: ImageIndex, plan: Planned
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Crop windows [B, 4] (left, top, width, height) and flips [B] of a micro-batch."""
    windows = crop_windows(
        seed,
        plan.epoch,
        plan.ids,
        index.widths[plan.ids],
        index.heights[plan.ids],
        config.crop_scale,
        config.crop_ratio,
    )
    return windows, flips(seed, plan.epoch, plan.ids, config.hflip)
