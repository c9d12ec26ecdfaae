"""Cases of jepa_loss. B batch, M blocks, Kt targets, N patches, D width."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..._runtime.rows import compute_dtype
from ...testing import Inputs, Mode, OpCase, distinct_rows, draw_indices, vit_sizes
from .op import jepa_loss
from .reference import JepaLoss, Stop, jepa_loss_reference


def jepa_loss_eager(
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
    """As facebookresearch/ijepa does it: normalise all tokens, gather, smooth-L1.

    The terms of N-JEPA beside it, one call each.
    """
    dtype = compute_dtype(pred, h, noised)
    width = h.shape[2]
    with torch.no_grad():
        normed = F.layer_norm(h.to(dtype), (width,), eps=eps)
        blocks = target_idx.unbind(1)
        target = torch.cat([normed.gather(1, j.unsqueeze(-1).repeat(1, 1, width)) for j in blocks])
    p = pred.to(dtype)
    clean = F.smooth_l1_loss(p, target, beta=beta)
    if noised is None:
        return JepaLoss(clean, clean.detach(), None, None)
    q = noised.to(dtype)
    noise = F.smooth_l1_loss(q, target, beta=beta)
    first = q.detach() if consistency_stop == "noised" else q
    second = p.detach() if consistency_stop == "clean" else p
    distance = F.mse_loss(first, second)
    loss = clean + noise_weight * noise + consistency * distance
    return JepaLoss(loss, clean.detach(), noise.detach(), distance.detach())


def _case(
    size: str,
    b: int,
    m: int,
    kt: int,
    n: int,
    d: int,
    *,
    noised: bool = False,
    noise_weight: float = 0.1,
    consistency: float = 0.1,
    stop: Stop = "none",
    beta: float = 1.0,
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        inputs: Inputs = {
            "pred": torch.randn(m * b, kt, d, generator=g).to(device, dtype),
            "h": (torch.randn(b, n, d, generator=g) * 3 + 1).to(device, dtype),
            "target_idx": draw_indices(b * m, n, kt, g).view(b, m, kt).to(device),
            "noised": None,
            "beta": beta,
        }
        if noised:
            # Closer to the other prediction than to the targets, as two predictors are.
            away = 0.5 * torch.randn(m * b, kt, d, generator=g)
            inputs |= {
                "noised": (inputs["pred"].float() + away.to(device)).to(dtype),
                "noise_weight": noise_weight,
                "consistency": consistency,
                "consistency_stop": stop,
            }
        return inputs

    rows, predictions = b * m * kt, 2 if noised else 1

    def traffic(dtype: torch.dtype, mode: Mode) -> int:
        # Predictions in and their gradients out; a target that several blocks name once; the index.
        moved = predictions * (2 if mode == "fwdbwd" else 1) * rows + b * distinct_rows(n, kt, m)
        return moved * d * dtype.itemsize + rows * 8

    def flops(mode: Mode) -> int:
        forward = 5 + 5 * predictions + (3 if noised else 0)
        backward = (4 if noised else 2) * predictions
        return rows * d * (forward + (backward if mode == "fwdbwd" else 0))

    return OpCase(
        op="jepa_loss",
        size=size,
        function=jepa_loss,
        reference=jepa_loss_reference,
        eager=jepa_loss_eager,
        make_inputs=make_inputs,
        bytes=traffic,
        flops=flops,
        differentiable=("pred", "noised"),
        small=small,
        devices=devices,
        is_derivative=stop == "none",
    )


CASES = [
    _case("b3-m4-kt6-n36-d64", 3, 4, 6, 36, 64),
    _case("b3-m4-kt6-n36-d64-noised", 3, 4, 6, 36, 64, noised=True),
    _case("b2-m2-kt6-n36-d64-beta.3", 2, 2, 6, 36, 64, beta=0.3),
    _case("b2-m1-kt1-n197-d100", 2, 1, 1, 197, 100),
    _case("b2-m3-kt5-n16-d33-l1", 2, 3, 5, 16, 33, beta=0.0),
    _case("b2-m3-kt5-n16-d33-l1-noised", 2, 3, 5, 16, 33, noised=True, noise_weight=1.5, beta=0.0),
    *(
        _case(
            f"b2-m1-kt7-n197-d100-beta.3-stop-{stop}",
            *(2, 1, 7, 197, 100),
            noised=True,
            noise_weight=0.3,
            consistency=0.7,
            stop=stop,
            beta=0.3,
        )
        for stop in ("clean", "noised")
    ),
    _case("b0-m4-kt6-n36-d64", 0, 4, 6, 36, 64),
    _case("b0-m4-kt6-n36-d64-noised", 0, 4, 6, 36, 64, noised=True),
    *(
        _case(
            size + ("-noised" if noised else ""),
            *(b, 4, vit.targets, vit.patches, vit.width),
            noised=noised,
            small=False,
            devices=on,
        )
        for noised in (False, True)
        for size, vit, b, on in vit_sizes()
    ),
]
