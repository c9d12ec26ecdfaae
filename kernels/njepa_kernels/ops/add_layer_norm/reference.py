"""The specification of add_layer_norm in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..._runtime.rows import compute_dtype


class AddLayerNorm(NamedTuple):
    """What ``add_layer_norm`` returns."""

    out: torch.Tensor
    """The normalised sum, for the next layer."""
    residual: torch.Tensor
    """The sum itself, for the next residual add."""


def add_layer_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> AddLayerNorm:
    """x + residual, rounded to the type of ``residual``, and its LayerNorm in fp32."""
    total = x
    if residual is not None:
        dtype = compute_dtype(x, residual)
        total = (x.to(dtype) + residual.to(dtype)).to(residual.dtype)
    dtype = compute_dtype(total, weight, bias)
    out = F.layer_norm(total.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return AddLayerNorm(out.to(x.dtype if out_dtype is None else out_dtype), total)
