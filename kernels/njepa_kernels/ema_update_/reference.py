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
    wide = [source.to(target.dtype) for target, source in zip(targets, sources, strict=True)]
    torch._foreach_mul_(targets, momentum)
    if isinstance(momentum, torch.Tensor):
        torch._foreach_add_(targets, torch._foreach_mul(wide, 1.0 - momentum))
    else:
        torch._foreach_add_(targets, wide, alpha=1.0 - momentum)
    if shadow is not None:
        torch._foreach_copy_(shadow, targets)
