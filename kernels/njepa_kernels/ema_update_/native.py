"""ema_update_ in C++ (csrc/cpu/loss.cpp): one call for all tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._native import ops


def update(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """t <- m t + (1 - m) s, in place; then shadow <- t. All contiguous and on CPU."""
    if targets:
        # 1 - m in the type of m: a tensor's own, fp64 for a float.
        ops().ema_update_(targets, sources, float(momentum), float(1.0 - momentum), shadow or [])
