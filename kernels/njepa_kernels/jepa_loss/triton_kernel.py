"""Triton kernels of jepa_loss. B batch, M blocks, Kt targets, N patches, D width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._blocks import row_tile, tuned
from .._triton import cdiv, launch

_ELEMENTS = 4096  # per program of the backward, which only scales


@triton.jit(do_not_specialize=["n_rows", "batch", "n_blocks", "n_targets", "n", "beta", "eps"])
def _jepa_loss_fwd_kernel(
    per_token_ptr,
    slope_ptr,
    pred_ptr,
    h_ptr,
    target_idx_ptr,
    weight_ptr,
    n_rows,
    batch,
    n_blocks,
    n_targets,
    n,
    beta,
    eps,
    D: tl.constexpr,
    L1: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Whole rows in registers: LayerNorm of the target, loss and slope from one read of each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    live = row < n_rows
    mask = live[:, None] & (col < D)[None, :]
    patch = tl.load(target_idx_ptr + row, mask=live, other=0)
    b = row // (n_blocks * n_targets)
    m = (row // n_targets) % n_blocks
    # Rows are counted in int32, addresses in int64.
    source = (b.to(tl.int64) * n + patch) * D
    at = ((m * batch + b).to(tl.int64) * n_targets + row % n_targets) * D
    h = tl.load(h_ptr + source[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    pred = tl.load(pred_ptr + at[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(h, axis=1) / D
    centred = tl.where(mask, h - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    e = pred - centred * (1.0 / tl.sqrt_rn(variance + eps))[:, None]
    size = tl.abs(e)
    # Comparisons that are false for nan lead to a branch that keeps it.
    if L1:
        element = size
        slope = tl.where(e > 0.0, 1.0, tl.where(e < 0.0, -1.0, e))
    else:
        element = tl.where(size < beta, e * e * (0.5 / beta), size - 0.5 * beta)
        slope = tl.where(e >= beta, 1.0, tl.where(e <= -beta, -1.0, e / beta))
    tl.store(per_token_ptr + row, tl.sum(tl.where(mask, element, 0.0), axis=1) / D, mask=live)
    if NEED_GRAD:
        if HAS_WEIGHT:
            slope *= tl.load(weight_ptr + row, mask=live, other=0.0)[:, None]
        tl.store(slope_ptr + at[:, None] + col[None, :], slope, mask=mask)


@triton.jit
def _jepa_loss_bwd_kernel(dpred_ptr, slope_ptr, grad_ptr, count, inverse, BLOCK: tl.constexpr):
    """dpred = slope * (grad * inverse); the factor stays fp32 (bf16 would bias every gradient)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    mask = at < count - start
    factor = tl.load(grad_ptr).to(tl.float32) * inverse
    slope = tl.load(slope_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dpred_ptr + start + at, slope * factor, mask=mask)


def forward(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    weight: torch.Tensor | None,
    beta: float,
    eps: float,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """pred [M*B,Kt,D], h [B,N,D], weight fp32 [B,M,Kt] or None -> loss, per_token, slope.

    slope = weight * s'(e) in the type of ``pred``, of order 1: the gradient itself is smaller by
    the number of elements and would be lost in fp16.
    """
    batch, n_blocks, n_targets = target_idx.shape
    _, n, width = h.shape
    per_token = torch.empty(target_idx.shape, dtype=torch.float32, device=pred.device)
    slope = torch.empty_like(pred) if need_grad else None
    tile = tuned("jepa_loss_fwd", row_tile(width), width, pred.dtype, h.dtype)
    n_rows = target_idx.numel()
    launch(
        _jepa_loss_fwd_kernel,
        (cdiv(n_rows, tile.rows),),
        per_token,
        slope,
        pred,
        h,
        target_idx,
        weight,
        n_rows,
        batch,
        n_blocks,
        n_targets,
        n,
        beta,
        eps,
        D=width,
        L1=beta == 0.0,
        HAS_WEIGHT=weight is not None,
        NEED_GRAD=need_grad,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    weighted = per_token if weight is None else per_token * weight
    return weighted.mean(), per_token, slope


def backward(grad: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """slope * grad / (number of elements), in the type of ``slope``."""
    dpred = torch.empty_like(slope)
    count = slope.numel()
    launch(
        _jepa_loss_bwd_kernel,
        (cdiv(count, _ELEMENTS),),
        dpred,
        slope,
        grad,
        count,
        1.0 / max(count, 1),
        BLOCK=_ELEMENTS,
        num_warps=4,
    )
    return dpred
