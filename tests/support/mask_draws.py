"""Samplers, ids and readings of masks, for the tests of masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from njepa.config import MaskConfig
from njepa.draws.masks import MaskSampler

GRID = (14, 14)
ONE = (1.0, 1.0)


def sampler(compat: str = "fixed", grid: tuple[int, int] = GRID, seed: int = 0, **kw: Any):
    return MaskSampler(MaskConfig(compat=compat, **kw), grid, seed)


def ids_of(step: int, batch: int) -> np.ndarray:
    return np.arange(step * batch, (step + 1) * batch, dtype=np.int64)


def inclusion(indices: np.ndarray, patches: int) -> np.ndarray:
    """Which patches [G, N] a row of [G, K] or [G, M, K] indices holds."""
    rows = indices.reshape(len(indices), -1)
    held = np.zeros((len(rows), patches), dtype=bool)
    np.put_along_axis(held, rows, True, axis=1)
    return held


def corners(target_idx: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return target_idx[..., 0] // grid[1], target_idx[..., 0] % grid[1]
