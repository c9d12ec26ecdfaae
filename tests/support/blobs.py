"""Points around the centres of their classes, for classifiers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def blobs(
    n: int, seed: int, classes: int = 5, width: int = 16, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``n`` points, float32 [n, width], and their classes; the centres depend on no seed."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    y = rng.integers(classes, size=n)
    x = centres[y] + spread * rng.normal(size=(n, width))
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)
