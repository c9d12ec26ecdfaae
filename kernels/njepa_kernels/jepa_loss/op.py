"""jepa_loss: smooth-L1 between predictions and layer-normed target features."""

from __future__ import annotations

import torch

from .._checks import INDEX, check_index_range, check_per_block, check_tensor
from .._dispatch import Impl, choose
from .reference import JepaLoss, jepa_loss_reference


def jepa_loss(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    weight: torch.Tensor | None = None,
    beta: float = 1.0,
    eps: float = 1e-5,
    *,
    impl: Impl = "auto",
) -> JepaLoss:
    """The prediction loss of I-JEPA, also per token (from which a loss per noise level follows).

    B batch, M target blocks, Kt targets per block, N patches, D width:

        y[b, m, t] = LayerNorm(h[b, target_idx[b, m, t]])        no affine; only these rows
        e = pred[m*B + b, t] - y[b, m, t]
        s(e) = e^2 / (2 beta) where |e| < beta, else |e| - beta/2         (beta = 0: |e|)
        loss = mean over b, m, t, D of weight * s(e);   per_token = mean over D of s(e)

    Without ``weight`` this is, bit for bit in fp32, what the published code computes
    (facebookresearch/ijepa, src/train.py: layer_norm of all tokens, gather, smooth_l1_loss).

    Args:
        pred: [M*B, Kt, D], row m*B + b, fp32, bf16, fp16 or fp64.
        h: [B, N, D] of any floating type: the target encoder's features. A constant: it gets no
            gradient, even if it requires one.
        target_idx: int64 [B, M, Kt] in [0, N).
        weight: floating [B, M] or [B, M, Kt], or None for 1. It may require a gradient.
        beta: where the square meets the line, in units of the normalised features, >= 0.
        eps: of the LayerNorm, > 0.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        JepaLoss(loss, per_token): a scalar and [B, M, Kt], both fp32 (fp64 if an input is fp64), as
        are all sums inside. per_token is detached and unweighted. An empty batch gives nan.

    Raises:
        TypeError, ValueError: wrong type, shape, device or number, or an index outside [0, N) (on
            an accelerator only under ``njepa_kernels.debug_checks()``, to spare a host sync).
    """
    op = "jepa_loss"
    check_tensor(op, "h", h, "[B,N,D]")
    batch, n, width = h.shape
    device = h.device
    check_tensor(
        op, "target_idx", target_idx, "[B,M,Kt]", (batch, None, None), dtypes=INDEX, device=device
    )
    _, n_blocks, n_targets = target_idx.shape
    check_tensor(
        op, "pred", pred, "[M*B,Kt,D]", (n_blocks * batch, n_targets, width), device=device
    )
    if weight is not None:
        check_per_block(op, "weight", weight, target_idx)
    if not beta >= 0:
        raise ValueError(f"{op}: beta must be at least 0, got {beta}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    check_index_range(op, "target_idx", target_idx, n)
    choose(op, impl, device)
    return jepa_loss_reference(pred, h, target_idx, weight, beta, eps)
