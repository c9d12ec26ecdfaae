"""ema_update_ in C++ and CUDA (csrc/*/ema_update.*): one call for all tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..._runtime.native import ops


def update(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    rest: float,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """t <- m t + rest s, in place; then shadow <- t. All contiguous; CUDA: any devices.

    A momentum that is a tensor is on a device and stays there; then ``rest`` is not used.
    """
    if not targets:
        return
    if targets[0].device.type == "cpu":
        ops("cpu").ema_update_(targets, sources, momentum, rest, shadow or [])
    else:
        _update_cuda(targets, sources, momentum, rest, shadow)


def _update_cuda(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    rest: float,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """A launch per device, type of the sources and 96 tensors."""
    members: dict[torch.device, list[int]] = {}
    for i, target in enumerate(targets):
        members.setdefault(target.device, []).append(i)
    rates, number = None, 0.0
    if isinstance(momentum, torch.Tensor):
        rates = torch.stack((momentum, 1.0 - momentum)).float()
    else:
        number = momentum
    for device, chosen in members.items():
        ops("cuda").ema_update_(
            [targets[i] for i in chosen],
            [sources[i] for i in chosen],
            number,
            rest,
            None if rates is None else rates.to(device),
            [] if shadow is None else [shadow[i] for i in chosen],
        )
