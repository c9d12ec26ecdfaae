"""Pixels as the network wants them."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(
    images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """(x / 255 - mean) / std per channel: uint8 [B, 3, S, S] to contiguous float32."""
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return pixels.mul_(scale[:, None, None]).add_(shift[:, None, None])
