"""Cases of jepa_loss. B batch, M blocks, Kt targets, N patches, D width."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .._rows import compute_dtype
from ..testing import Inputs, Mode, OpCase, draw_indices, vit_sizes
from .op import jepa_loss
from .reference import JepaLoss, jepa_loss_reference


def jepa_loss_eager(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    weight: torch.Tensor | None = None,
    beta: float = 1.0,
    eps: float = 1e-5,
) -> JepaLoss:
    """As facebookresearch/ijepa does it: normalise all tokens, gather, smooth-L1."""
    dtype = compute_dtype(pred, h)
    batch, n_blocks, n_targets = target_idx.shape
    width = h.shape[2]
    with torch.no_grad():
        normed = F.layer_norm(h.to(dtype), (width,), eps=eps)
        blocks = target_idx.unbind(1)
        target = torch.cat([normed.gather(1, j.unsqueeze(-1).repeat(1, 1, width)) for j in blocks])
    elements = F.smooth_l1_loss(pred.to(dtype), target, reduction="none", beta=beta)
    per_token = elements.detach().mean(-1).view(n_blocks, batch, n_targets).transpose(0, 1)
    if weight is not None:
        w = weight if weight.dim() == 3 else weight.unsqueeze(-1).repeat(1, 1, n_targets)
        elements = elements * w.transpose(0, 1).reshape(n_blocks * batch, n_targets, 1)
    return JepaLoss(elements.mean(), per_token)


def _case(
    size: str,
    b: int,
    m: int,
    kt: int,
    n: int,
    d: int,
    *,
    weight: str | None = None,
    beta: float = 1.0,
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        weights = None
        if weight is not None:
            weights = torch.rand(b, m, *([kt] if weight == "token" else []), generator=g)
            weights = weights.to(device)
        return {
            "pred": torch.randn(m * b, kt, d, generator=g).to(device, dtype),
            "h": (torch.randn(b, n, d, generator=g) * 3 + 1).to(device, dtype),
            "target_idx": draw_indices(b * m, n, kt, g).view(b, m, kt).to(device),
            "weight": weights,
            "beta": beta,
        }

    rows = b * m * kt

    def traffic(dtype: torch.dtype, mode: Mode) -> int:
        per_row = 2 * d * dtype.itemsize + 8 + 4  # pred and h in, index in, per_token out
        return rows * (per_row + (d * dtype.itemsize if mode == "fwdbwd" else 0))

    return OpCase(
        op="jepa_loss",
        size=size,
        function=jepa_loss,
        reference=jepa_loss_reference,
        eager=jepa_loss_eager,
        make_inputs=make_inputs,
        bytes=traffic,
        flops=lambda mode: rows * d * (12 if mode == "fwdbwd" else 10),
        differentiable=("pred", "weight"),
        small=small,
        devices=devices,
    )


CASES = [
    _case("b3-m4-kt6-n36-d64", 3, 4, 6, 36, 64),
    _case("b3-m4-kt6-n36-d64-block", 3, 4, 6, 36, 64, weight="block"),
    _case("b2-m2-kt6-n36-d64-token-beta.3", 2, 2, 6, 36, 64, weight="token", beta=0.3),
    _case("b2-m1-kt1-n197-d100", 2, 1, 1, 197, 100),
    _case("b2-m3-kt5-n16-d33-l1", 2, 3, 5, 16, 33, beta=0.0),
    _case("b0-m4-kt6-n36-d64", 0, 4, 6, 36, 64),
    *(
        _case(size, b, 4, vit.targets, vit.patches, vit.width, small=False, devices=on)
        for size, vit, b, on in vit_sizes()
    ),
]
