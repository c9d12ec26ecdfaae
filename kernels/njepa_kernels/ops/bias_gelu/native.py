"""bias_gelu in C++ (csrc/cpu/bias_gelu.*). Contiguous rows [rows, D]."""

from __future__ import annotations

import torch

from ..._runtime.native import ops


def forward(x: torch.Tensor, bias: torch.Tensor, tanh: bool) -> torch.Tensor:
    """[rows, D] in the type of ``x``."""
    out = torch.empty_like(x)
    ops().bias_gelu_forward(x, bias.float(), tanh, out)
    return out


def backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [rows, D] in the type of ``x``, dbias [D] in fp32."""
    dx, dbias = torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.float32)
    ops().bias_gelu_backward(grad, x, bias.float(), tanh, dx, dbias)
    return dx, dbias
