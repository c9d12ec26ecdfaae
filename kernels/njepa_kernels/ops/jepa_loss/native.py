"""jepa_loss in C++ and CUDA (csrc/*/jepa_loss.*). Contiguous inputs, indices in range."""

from __future__ import annotations

import torch

from ..._runtime.native import ops


def forward(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    noised: torch.Tensor | None,
    noise_weight: float,
    consistency: float,
    beta: float,
    eps: float,
    scale: float,
    pull_pred: float,
    pull_noised: float,
    need_pred: bool,
    need_noised: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss; the three terms, and the slopes of both predictions, each empty if there is none.

    The slope of pred is scale * s'(pred - y) + pull_pred * (pred - noised), in its type; that of
    noised is noise_weight * scale * s'(noised - y) + pull_noised * (noised - pred).
    """
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = ops(
        pred.device.type
    ).jepa_loss_forward(
        pred,
        h,
        target_idx,
        noised,
        noise_weight,
        consistency,
        beta,
        eps,
        scale,
        pull_pred,
        pull_noised,
        need_pred,
        need_noised,
    )
    return result


def backward(
    grad: torch.Tensor, slopes: list[torch.Tensor], out: list[torch.Tensor], scale: float
) -> None:
    """out = slopes * (grad * scale); where out is slopes and the factor 1, nothing is touched."""
    ops(slopes[0].device.type).jepa_loss_backward(grad.float(), slopes, out, scale)
