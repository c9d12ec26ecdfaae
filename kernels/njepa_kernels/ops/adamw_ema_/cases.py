"""Cases of adamw_ema_: lists of tensors as a ViT has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...testing import VITS, Inputs, OpCase
from ..ema_update_.cases import ema_update_eager_, vit_shapes
from .op import adamw_ema_
from .reference import Number, adamw_ema_reference_


@torch.no_grad()
def adamw_ema_eager_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    targets: Sequence[Tensor] | None,
    momentum: Number,
    params_bf16: Sequence[Tensor] | None,
    targets_bf16: Sequence[Tensor] | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """AdamW as torch composes it for a tensor, then the average as facebookresearch/ijepa does."""
    if found_inf is not None and found_inf:
        return
    for p, grad, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        g = grad.to(p.dtype) if scale is None else grad.to(p.dtype) * scale
        t = step.double()
        p.mul_(1.0 - lr * weight_decay)
        m.lerp_(g, 1.0 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1.0 - betas[1])
        root = (1.0 - betas[1] ** t).sqrt().to(p.dtype)
        rate = (lr / (1.0 - betas[0] ** t)).to(p.dtype)
        p.sub_(rate * m / (v.sqrt() / root).add_(eps))
    if targets is not None:
        ema_update_eager_(targets, params, momentum, targets_bf16)
    for copy, p in zip(params_bf16 or (), params, strict=params_bf16 is not None):
        copy.copy_(p)


_WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "steps", "targets", "params_bf16", "targets_bf16")


def _written(result: Any, inputs: Inputs) -> dict[str, Tensor]:
    return {f"{name} {i}": t for name in _WRITTEN for i, t in enumerate(inputs[name] or [])}


def _case(
    size: str,
    shapes: Sequence[tuple[int, ...]],
    *,
    average: bool = True,
    copies: bool = True,
    bad: bool | None = None,
    scaled: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    """``bad``: found_inf, None: not given."""

    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(size: float) -> list[Tensor]:
            return [size * torch.randn(s, generator=generator).to(device) for s in shapes]

        params, targets = draw(0.1), draw(0.1)
        flag = None if bad is None else torch.tensor(float(bad), device=device)
        return {
            "params": params,
            "grads": [grad.to(dtype) for grad in draw(0.01)],
            "exp_avgs": draw(0.01),
            "exp_avg_sqs": [x.square() for x in draw(0.01)],
            "steps": [torch.full((), 7.0, device=device) for _ in shapes],
            "lr": 1e-3,
            "betas": betas,
            "eps": 1e-8,
            "weight_decay": 0.05,
            "targets": targets if average else None,
            "momentum": 0.996,
            "params_bf16": [x.bfloat16() for x in params] if copies else None,
            "targets_bf16": [x.bfloat16() for x in targets] if copies and average else None,
            "scale": torch.tensor(0.5, device=device) if scaled else None,
            "found_inf": flag,
        }

    count = sum(torch.Size(shape).numel() for shape in shapes)
    each = 24 + 8 * average + (2 + 2 * average) * copies
    return OpCase(
        op="adamw_ema_",
        size=size,
        function=adamw_ema_,
        reference=adamw_ema_reference_,
        eager=adamw_ema_eager_,
        make_inputs=make_inputs,
        bytes=lambda dtype, mode: count * (each + dtype.itemsize),
        flops=lambda mode: (15 + 3 * average) * count,
        small=small,
        devices=devices,
        outputs=_written,
    )


_FIVE: list[tuple[int, ...]] = [(3,), (17, 5), (0, 4), (), (2, 3, 4)]
CASES = [
    _case("five", _FIVE),
    _case("five-adamw", _FIVE, average=False, copies=False, bad=False),
    _case("five-scaled", _FIVE, scaled=True, bad=False, betas=(0.4, 0.95)),
    _case("five-bad", _FIVE, bad=True),
    _case("none", []),
    # H/14 takes 24 GB with its fp64 check beside it, so that it is left out.
    *(
        _case(
            name,
            vit_shapes(vit),
            small=False,
            devices=("cpu", "cuda") if vit.width < 1024 else ("cuda",),
        )
        for name, vit in VITS.items()
        if vit.width <= 1024
    ),
]
