"""add_layer_norm in C++ (csrc/cpu/add_layer_norm.*). Contiguous rows [rows, D]."""

from __future__ import annotations

import torch

from ..._runtime.native import ops


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [rows, D]; the sum, empty without a residual; mean and 1 / std [2, rows]."""
    out = torch.empty_like(x, dtype=out_dtype)
    total = x.new_empty(0) if residual is None else torch.empty_like(residual)
    stats = x.new_empty(2, x.shape[0], dtype=torch.float32)
    ops().add_layer_norm_forward(x, residual, weight.float(), bias.float(), eps, out, total, stats)
    return out, total, stats


def backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    x_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx; dresidual where its type is another, else empty; sums for weight and bias [2, D]."""
    dx = torch.empty_like(total, dtype=x_dtype)
    dresidual = total.new_empty(0) if x_dtype == total.dtype else torch.empty_like(total)
    sums = total.new_empty(2, total.shape[1], dtype=torch.float32)
    ops().add_layer_norm_backward(
        grad, grad_total, total, stats, weight.float(), dx, dresidual, sums
    )
    return dx, dresidual, sums
