"""The specification of jepa_loss in plain PyTorch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from ..._runtime.rows import compute_dtype, gather_rows

#: Which prediction counts as a constant in the consistency term.
Stop = Literal["none", "clean", "noised"]


class JepaLoss(NamedTuple):
    """The loss and its terms: scalars, fp32; all but ``loss`` detached and unweighted."""

    loss: torch.Tensor
    clean: torch.Tensor
    noised: torch.Tensor | None
    consistency: torch.Tensor | None


def jepa_loss_reference(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    noised: torch.Tensor | None = None,
    *,
    noise_weight: float = 0.1,
    consistency: float = 0.1,
    consistency_stop: Stop = "none",
    beta: float = 1.0,
    eps: float = 1e-5,
) -> JepaLoss:
    """smooth-L1 of both predictions to LayerNorm(h)[target_idx], and their distance, in fp32."""
    dtype = compute_dtype(pred, h, noised)
    rows = gather_rows(h.detach(), target_idx, block_major=True).to(dtype)
    target = F.layer_norm(rows, (h.shape[2],), eps=eps).view(pred.shape)
    p = pred.to(dtype)
    clean = F.smooth_l1_loss(p, target, beta=beta)
    if noised is None:
        return JepaLoss(clean, clean.detach(), None, None)
    q = noised.to(dtype)
    noise = F.smooth_l1_loss(q, target, beta=beta)
    distance = F.mse_loss(
        q.detach() if consistency_stop == "noised" else q,
        p.detach() if consistency_stop == "clean" else p,
    )
    loss = clean + noise_weight * noise + consistency * distance
    return JepaLoss(loss, clean.detach(), noise.detach(), distance.detach())
