"""The specification of ema_update_ in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.no_grad()
def ema_update_reference_(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    shadow: Sequence[torch.Tensor] | None = None,
) -> None:
    """t <- m t + (1 - m) s in fp32, in place; shadow <- t."""
    if not targets:
        return
    means = list(targets)
    wide = [source.to(mean.dtype) for mean, source in zip(means, sources, strict=True)]
    if isinstance(momentum, torch.Tensor):
        torch._foreach_mul_(means, momentum)
        torch._foreach_add_(means, torch._foreach_mul(wide, 1.0 - momentum))
    else:
        torch._foreach_mul_(means, momentum)
        torch._foreach_add_(means, wide, alpha=1.0 - momentum)
    if shadow is not None:
        torch._foreach_copy_(list(shadow), means)
