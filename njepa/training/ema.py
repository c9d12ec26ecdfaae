"""The target encoder: an exponential moving average of the context encoder."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import cast

import torch
from njepa_kernels import Impl, ema_update_
from torch import Tensor, nn

from njepa.models.encoder import Encoder


def make_target(encoder: Encoder) -> Encoder:
    """A copy of the encoder in fp32, without gradients, in eval mode; before DeepSpeed wraps it."""
    return deepcopy(encoder).float().eval().requires_grad_(False)


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


def update_target(
    target: Encoder, sources: Sequence[Tensor], momentum: float | Tensor, impl: Impl = "auto"
) -> None:
    """target <- m target + (1 - m) source, in fp32 and in place.

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
        ema_update_(targets, [s.detach() for s in sources], momentum, impl=impl)
