"""adamw_ema_ in C++ (csrc/cpu/adamw_ema.*): one call for all tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._runtime.native import ops


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    targets: Sequence[Tensor],
    params_bf16: Sequence[Tensor],
    targets_bf16: Sequence[Tensor],
    lr: Tensor,
    betas: Sequence[float],
    eps: float,
    weight_decay: Tensor,
    momentum: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """All contiguous and on the CPU; lists that are not wanted are empty."""
    if found_inf is not None and bool(found_inf):
        return
    ops("cpu").adamw_ema_(
        params, grads, exp_avgs, exp_avg_sqs, steps, targets, params_bf16, targets_bf16,
        float(lr), *betas, eps, float(weight_decay), float(momentum), float(1.0 - momentum),
        1.0 if scale is None else float(scale),
    )  # fmt: skip
