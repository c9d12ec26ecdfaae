"""ema_update_ in C++ (csrc/cpu/loss.cpp) and CUDA (csrc/cuda/ema.cu): one call for all tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..._runtime.native import ops


def update(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """t <- m t + (1 - m) s, in place; then shadow <- t. All contiguous; CUDA: any devices."""
    if not targets:
        return
    if targets[0].device.type == "cpu":
        # 1 - m in the type of m: a tensor's own, fp64 for a float.
        rest = float(1.0 - momentum)
        ops("cpu").ema_update_(targets, sources, float(momentum), rest, shadow or [])
    else:
        _update_cuda(targets, sources, momentum, shadow)


def _update_cuda(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """A launch per device, type of the sources and 96 tensors; a momentum on a device stays there.

    Reading it would make the host wait.
    """
    members: dict[torch.device, list[int]] = {}
    for i, target in enumerate(targets):
        members.setdefault(target.device, []).append(i)
    rates, number, rest = None, 0.0, 0.0
    if isinstance(momentum, torch.Tensor) and momentum.device.type != "cpu":
        rates = torch.stack((momentum, 1.0 - momentum)).float()
    else:
        number, rest = float(momentum), float(1.0 - momentum)
    for device, chosen in members.items():
        ops("cuda").ema_update_(
            [targets[i] for i in chosen],
            [sources[i] for i in chosen],
            number,
            rest,
            None if rates is None else rates.to(device),
            [] if shadow is None else [shadow[i] for i in chosen],
        )
