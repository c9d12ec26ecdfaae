"""The specification of jepa_loss in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .._rows import compute_dtype, gather_rows


class JepaLoss(NamedTuple):
    """loss: scalar, fp32. per_token: [B, M, Kt], fp32, unweighted mean over D, detached."""

    loss: torch.Tensor
    per_token: torch.Tensor


def jepa_loss_reference(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    weight: torch.Tensor | None = None,
    beta: float = 1.0,
    eps: float = 1e-5,
) -> JepaLoss:
    """mean of weight * smooth_l1_beta(pred - LayerNorm(h)[target_idx]), in fp32."""
    dtype = compute_dtype(pred, h, weight)
    batch, n_blocks, n_targets = target_idx.shape
    width = h.shape[2]
    rows = gather_rows(h.detach(), target_idx, block_major=True).to(dtype)
    target = F.layer_norm(rows, (width,), eps=eps)
    blocks = pred.view(n_blocks, batch, n_targets, width).to(dtype)
    elements = F.smooth_l1_loss(blocks, target, reduction="none", beta=beta)
    per_token = elements.detach().mean(dim=-1).transpose(0, 1).contiguous()
    if weight is not None:
        per_row = weight if weight.dim() == 3 else weight.unsqueeze(-1)
        elements = elements * per_row.to(dtype).transpose(0, 1).unsqueeze(-1)
    return JepaLoss(elements.mean(), per_token)
