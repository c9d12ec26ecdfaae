"""A step of the published-style script (``bench.published.script``), plain or accelerated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from njepa_kernels import integrations
from torch import nn

from bench.published import script as style

B, N = 3, 16
each_contexts = pytest.mark.parametrize("n_contexts", [1, 2])


def setup(n_contexts: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    encoder, predictor = style.Encoder().to(dtype), style.Predictor().to(dtype)
    images = torch.randn(B, 3, 16, 16).to(dtype)
    masks_enc, masks_pred = style.draw_masks(B, N, 7, 3, n_contexts)
    return encoder, predictor, images, masks_enc, masks_pred


def step_values(
    encoder: Any, predictor: Any, *inputs: Any, amp: bool = False
) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one step."""
    for module in (encoder, predictor):
        module.zero_grad()
    values = {"loss": style.make_step(encoder, predictor, amp=amp)(*inputs)}
    for module in (encoder, predictor):
        for name, p in module.named_parameters():
            if p.grad is not None:
                values[f"d {name}"] = p.grad.clone()
    return values


def orders(images: torch.Tensor, *masks: list[torch.Tensor]) -> Iterator[tuple[Any, ...]]:
    """The batch in each order that rotates it: the same sums in another order.

    Rounding errors of a whole step in bf16 are a matter of luck, eager's too: one order of the sums
    is one draw of them. The bound of each parameter takes the unluckiest.
    """
    for shift in range(len(images)):
        yield images.roll(shift, 0), *([m.roll(shift, 0) for m in kind] for kind in masks)


def accelerate_all(encoder: nn.Module, predictor: nn.Module, impl: Any = "auto") -> None:
    for part in (encoder, predictor, style):
        integrations.accelerate(part, impl)


def restore_all(encoder: nn.Module, predictor: nn.Module) -> None:
    for part in (encoder, predictor, style):
        integrations.restore(part)
