"""The specification of adamw_ema_ in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Number = float | Tensor


class Factors(NamedTuple):
    """What an update multiplies by: fp64, on the device of the steps."""

    step_size: Tensor
    """[n]: lr / (1 - beta1^t)."""
    root: Tensor
    """[n]: sqrt(1 - beta2^t)."""
    decay: Tensor
    """1 - lr weight_decay; this and the following 0-dim."""
    keep: Tensor
    """m."""
    take: Tensor
    """1 - m, in the type of m."""
    scale: Tensor


def factors(
    steps: Sequence[Tensor],
    lr: Number,
    betas: tuple[float, float],
    weight_decay: Number,
    momentum: Number,
    scale: Tensor | None,
) -> Factors:
    """Reads nothing on the host. ``steps``: with this one."""
    count = torch.stack(list(steps)).double()
    one = torch.ones((), dtype=torch.float64, device=count.device)
    return Factors(
        lr / (1.0 - betas[0] ** count),
        (1.0 - betas[1] ** count).sqrt(),
        one - lr * weight_decay,
        one * momentum,
        one * (1.0 - momentum),
        one if scale is None else one * scale,
    )


def is_bad(found_inf: Tensor | None, like: Tensor) -> Tensor:
    """bool, 0-dim."""
    if found_inf is None:
        return torch.zeros((), dtype=torch.bool, device=like.device)
    return found_inf != 0


@torch.no_grad()
def adamw_ema_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Number,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Number,
    targets: Sequence[Tensor] | None = None,
    momentum: Number = 1.0,
    params_bf16: Sequence[Tensor] | None = None,
    targets_bf16: Sequence[Tensor] | None = None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Tensor after tensor, in the type of ``params``."""
    if not params:
        return
    bad = is_bad(found_inf, steps[0])
    torch._foreach_add_(list(steps), [(~bad).to(steps[0].dtype)] * len(steps))
    exact = factors(steps, lr, betas, weight_decay, momentum, scale)
    f = Factors(*(x.to(params[0].dtype) for x in exact))
    for i, (p, exp_avg, exp_avg_sq) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
        g = grads[i].to(p.dtype) * f.scale
        m = torch.lerp(exp_avg, g, 1.0 - betas[0])
        v = exp_avg_sq * betas[1] + (1.0 - betas[1]) * g * g
        weight = p * f.decay - f.step_size[i] * m / (v.sqrt() / f.root[i] + eps)
        written = [(p, weight), (exp_avg, m), (exp_avg_sq, v)]
        if params_bf16 is not None:
            written.append((params_bf16[i], weight.to(params_bf16[i].dtype)))
        if targets is not None:
            mean = targets[i] * f.keep + weight * f.take
            written.append((targets[i], mean))
            if targets_bf16 is not None:
                written.append((targets_bf16[i], mean.to(targets_bf16[i].dtype)))
        for tensor, value in written:
            tensor.copy_(torch.where(bad, tensor, value))
