"""The target encoder: an exponential moving average of the context encoder."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import cast

import torch
from njepa_kernels import Impl, ema_update_
from torch import Tensor, nn

from njepa.models.block import GeluLinear
from njepa.models.encoder import Encoder
from njepa.training.fp8_target import Fp8Weights, products, use_fp8


def make_target(encoder: Encoder) -> Encoder:
    """A copy of the encoder in fp32, without gradients, in eval mode; before DeepSpeed wraps it."""
    return deepcopy(encoder).float().eval().requires_grad_(False)


@dataclass(frozen=True)
class LowTarget:
    """The target encoder as bf16 autocast computes it, without a cast of its weights in each pass.

    ``target`` stays the only one with fp32 values: what is saved, evaluated and averaged.
    """

    encoder: Encoder
    """The same features, bit for bit, unless products are in fp8: layers whose weights autocast
    would round have them rounded, all other parameters are the target's own."""
    copies: list[Tensor]
    """bf16, in the order of ``ema_parameters(target)``: every update writes them."""
    fp8: list[Fp8Weights] = field(default_factory=list)
    """Made of the copies; none where products are in bf16."""

    def refresh(self) -> None:
        """Follow the copies: once for each time that they are written."""
        for weights in self.fp8:
            weights.refresh()


def low_target(target: Encoder, fp8: bool = False) -> LowTarget:
    """Made on the device, before blocks are compiled; follows the target's ``load_state_dict``.

    Args:
        fp8: with ``model.target_dtype=fp8``.
    """
    followed = [p.detach() for p in ema_parameters(target)]
    low = {id(p): p.detach().bfloat16() for p in ema_parameters(target)}
    stacks: list[Fp8Weights] = []
    if fp8:
        for layers in products(target.blocks):
            keys = [id(layer.weight) for layer in layers]
            stacks.append(Fp8Weights(torch.stack([low[key] for key in keys])))
            low.update(zip(keys, stacks[-1].source.unbind(), strict=True))
    copies = [low[id(p)] for p in ema_parameters(target)]
    encoder = deepcopy(target, {id(p): p for p in target.parameters()})
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # The fused GELU adds its bias in fp32.
            for name in ("weight",) if isinstance(module, GeluLinear) else ("weight", "bias"):
                rounded = low[id(getattr(module, name))]
                setattr(module, name, nn.Parameter(rounded, requires_grad=False))
    if fp8:
        use_fp8(encoder.blocks, stacks)
    result = LowTarget(encoder, copies, stacks)

    def follow(*_: object) -> None:
        torch._foreach_copy_(copies, followed)
        result.refresh()

    target.register_load_state_dict_post_hook(follow)
    return result


def ema_parameters(encoder: Encoder) -> list[nn.Parameter]:
    """Parameters that the EMA follows, in a fixed order: all but the frozen position table."""
    return [p for name, p in encoder.named_parameters() if name != "pos_embed"]


def frozen_copy(like: Encoder, sources: Sequence[Tensor]) -> Encoder:
    """A copy of ``like`` with other parameters; its mode, type and device are those of ``like``.

    Args:
        sources: in the order of ``ema_parameters``.
    """
    copy = deepcopy(like)
    with torch.no_grad():
        for parameter, source in zip(ema_parameters(copy), sources, strict=True):
            parameter.copy_(source)
    return copy


def held_where(bad: Tensor, momentum: float | Tensor) -> Tensor:
    """m of an update that changes nothing where ``bad`` (0-dim), as ``update_target`` takes it."""
    if isinstance(momentum, Tensor):
        return momentum.masked_fill(bad != 0, 1.0)
    held = torch.full((), momentum, dtype=torch.float64, device=bad.device)
    return held.masked_fill_(bad != 0, 1.0)


def update_target(
    target: Encoder,
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    impl: Impl = "auto",
    copies: Sequence[Tensor] | None = None,
) -> None:
    """target <- m target + (1 - m) source, in fp32 and in place; copies <- target, in bf16.

    Args:
        sources: the context encoder's tensors in the order of ``ema_parameters``: the parameters,
            or what holds their fp32 values.
        momentum: m in [0, 1]; as a tensor fp64, 0-dim.

    Raises:
        ValueError: number or shapes of ``sources`` do not fit.
    """
    targets = cast(list[Tensor], ema_parameters(target))
    if isinstance(momentum, Tensor) and momentum.device.type == "cpu":
        momentum = float(momentum)  # it lies on the host already
    with torch.no_grad():
        ema_update_(targets, [s.detach() for s in sources], momentum, copies, impl=impl)
