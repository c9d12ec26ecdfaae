"""Small inputs of jepa_loss, and the implementations that run here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from njepa_kernels import jepa_loss
from njepa_kernels._runtime.dispatch import IMPLEMENTATIONS, choose

CPU = torch.device("cpu")
B, M, KT, N, D = 3, 2, 4, 9, 6


def _runs(impl: str) -> bool:
    try:
        return choose("jepa_loss", impl, CPU) == impl
    except RuntimeError:
        return False


IMPLS = [impl for impl in IMPLEMENTATIONS if _runs(impl)]
FUSED = [impl for impl in IMPLS if impl != "reference"]
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_fused = pytest.mark.parametrize("impl", FUSED)
each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16],
    ids=lambda d: str(d).removeprefix("torch."),
)


def make_inputs(dtype: torch.dtype = torch.float32, two: bool = False) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    inputs = {
        "pred": torch.randn(M * B, KT, D, generator=g).to(dtype),
        "h": (torch.randn(B, N, D, generator=g) * 2 + 3).to(dtype),
        "target_idx": torch.randint(0, N, (B, M, KT), generator=g),
    }
    if two:
        inputs["noised"] = torch.randn(M * B, KT, D, generator=g).to(dtype)
    return inputs


def leaves_of(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [inputs[name].requires_grad_() for name in ("pred", "noised") if name in inputs]


def gradients_of(inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, ...]:
    """Of the loss by new copies of the predictions."""
    inputs = {n: v.detach().clone() for n, v in inputs.items()}
    leaves = leaves_of(inputs)
    return torch.autograd.grad(jepa_loss(**inputs, **options).loss, leaves)
