"""vicreg in C++ (csrc/cpu/vicreg.*). u is contiguous; gathering over ranks happens outside."""

from __future__ import annotations

import torch

from ..._runtime.native import ops

Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def forward(u: torch.Tensor, gamma: float, eps: float) -> Terms:
    """inv, std, cov, and the mean and standard deviation [M, D] of u [M, n, D]; all fp32."""
    terms: Terms = ops().vicreg_forward(u, gamma, eps)
    return terms


def backward(
    u: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    g_inv: torch.Tensor,
    g_std: torch.Tensor,
    g_cov: torch.Tensor,
    gamma: float,
    eps: float,
) -> torch.Tensor:
    """The gradient of u in its type; mean and std are those of ``forward``."""
    du: torch.Tensor = ops().vicreg_backward(u, mean, std, g_inv, g_std, g_cov, gamma, eps)
    return du
