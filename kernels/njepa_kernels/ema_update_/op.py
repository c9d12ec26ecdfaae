"""ema_update_: the exponential moving average of many tensors, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._checks import FLOATS, can_read_values, check_like
from .._dispatch import Impl, choose
from .reference import ema_update_reference_


def _check_momentum(op: str, momentum: float | torch.Tensor) -> None:
    if isinstance(momentum, torch.Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise TypeError(
                f"{op}: momentum must be a float or a 0-dim floating tensor, "
                f"got {momentum.dtype} of shape {list(momentum.shape)}"
            )
        if not can_read_values(momentum):
            return
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"{op}: momentum must be in [0, 1], got {float(momentum)}")


def ema_update_(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    shadow: Sequence[torch.Tensor] | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """t <- m t + (1 - m) s for every pair of tensors, in fp32, in place; then shadow <- t.

    The target encoder's update of I-JEPA (facebookresearch/ijepa, src/train.py). Runs without
    autograd. Nothing is written if an argument is refused.

    Args:
        targets: fp32 tensors.
        sources: tensors of any floating type, with the shapes and devices of ``targets``.
        momentum: m in [0, 1], a float, or a 0-dim floating tensor (its value is not checked on an
            accelerator). 1 - m is taken in the tensor's own type: near m = 1 use fp64, because an
            fp32 m = 0.99999 is off by 0.14 % in 1 - m.
        shadow: bf16 tensors of the same shapes that receive the rounded result, or None.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Raises:
        TypeError, ValueError: wrong type, shape, device, number of tensors, or momentum.
    """
    op = "ema_update_"
    for name, tensors in (("sources", sources), ("shadow", shadow)):
        if tensors is not None and len(tensors) != len(targets):
            raise ValueError(
                f"{op}: {name} must have {len(targets)} tensors, as targets has, got {len(tensors)}"
            )
    for i, target in enumerate(targets):
        check_like(op, f"targets[{i}]", target, (torch.float32,), target)
        check_like(op, f"sources[{i}]", sources[i], FLOATS, target)
        if shadow is not None:
            check_like(op, f"shadow[{i}]", shadow[i], (torch.bfloat16,), target)
    _check_momentum(op, momentum)
    choose(op, impl, targets[0].device if targets else torch.device("cpu"))
    ema_update_reference_(targets, sources, momentum, shadow)
