"""jepa_loss in C++ (csrc/cpu/loss.cpp) and CUDA (csrc/cuda/loss.cu).

Contiguous inputs, indices in range.
"""

from __future__ import annotations

import torch

from .._native import ops


def forward(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    weight: torch.Tensor | None,
    beta: float,
    eps: float,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """loss, per_token [B, M, Kt], and the slope weight * s'(e) in the type of pred.

    weight is fp32 [B, M, Kt] or None.
    """
    loss, per_token, slope = ops(pred.device.type).jepa_loss_forward(
        pred, h, target_idx, weight, beta, eps, need_grad
    )
    return loss, per_token, slope if need_grad else None


def backward(grad: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The gradient of pred: slope * grad / number of elements, in the type of slope."""
    dpred: torch.Tensor = ops(slope.device.type).jepa_loss_backward(grad.float(), slope)
    return dpred
