"""Triton kernels of jepa_loss. B batch, M blocks, Kt targets, N patches, D width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._runtime.blocks import row_tile, tuned
from ..._runtime.launch import cdiv, launch

_ELEMENTS = 4096  # per program of the backward, which only scales


@triton.jit
def _smooth_l1(e, beta, L1: tl.constexpr):
    """s(e) and s'(e). Comparisons that are false for nan lead to a branch that keeps it."""
    size = tl.abs(e)
    if L1:
        element = size
        slope = tl.where(e > 0.0, 1.0, tl.where(e < 0.0, -1.0, e))
    else:
        element = tl.where(size < beta, e * e * (0.5 / beta), size - 0.5 * beta)
        slope = tl.where(e >= beta, 1.0, tl.where(e <= -beta, -1.0, e / beta))
    return element, slope


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sum_of_all(x):
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit(
    do_not_specialize=[
        *("n_rows", "batch", "n_blocks", "n_targets", "n"),
        *("slope_pred", "slope_noised", "pull_pred", "pull_noised", "beta", "eps"),
    ]
)
def _jepa_loss_fwd_kernel(
    partial_ptr,
    dpred_ptr,
    dnoised_ptr,
    pred_ptr,
    noised_ptr,
    h_ptr,
    target_idx_ptr,
    n_rows,
    batch,
    n_blocks,
    n_targets,
    n,
    slope_pred,
    slope_noised,
    pull_pred,
    pull_noised,
    beta,
    eps,
    D: tl.constexpr,
    L1: tl.constexpr,
    NOISED: tl.constexpr,
    NEED_PRED: tl.constexpr,
    NEED_NOISED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """LayerNorm of the target, terms and slopes; one read of each while a row fits in registers.

    Wider rows are read three times, of which the cache serves the last two: their mean, their
    variance, the rest.
    """
    WHOLE: tl.constexpr = D <= BLOCK_D
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    live = row < n_rows
    patch = tl.load(target_idx_ptr + row, mask=live, other=0)
    # An index out of range reads nothing; its target is NaN.
    inside = ((patch >= 0) & (patch < n))[:, None]
    b = row // (n_blocks * n_targets)
    m = (row // n_targets) % n_blocks
    # Rows are counted in int32, addresses in int64.
    source = ((b.to(tl.int64) * n + patch) * D)[:, None]
    at = (((m * batch + b).to(tl.int64) * n_targets + row % n_targets) * D)[:, None]
    if WHOLE:
        # All reads before the first sum, so that they are under way together.
        col = tl.arange(0, BLOCK_D)[None, :]
        mask = live[:, None] & (col < D)
        h = _load(h_ptr + source + col, mask & inside)
        pred = _load(pred_ptr + at + col, mask)
        noised = _load(noised_ptr + at + col, mask) if NOISED else pred
        mean = tl.sum(h, axis=1) / D
        centred = tl.where(mask, h - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / D
    else:
        total = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)[None, :]
            total += _load(h_ptr + source + col, live[:, None] & (col < D) & inside)
        mean = tl.sum(total, axis=1) / D
        total = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)[None, :]
            mask = live[:, None] & (col < D)
            centred = _load(h_ptr + source + col, mask & inside) - mean[:, None]
            centred = tl.where(mask, centred, 0.0)
            total += centred * centred
        variance = tl.sum(total, axis=1) / D
    scale = tl.where(inside, (1.0 / tl.sqrt_rn(variance + eps))[:, None], float("nan"))
    clean = tl.zeros([ROWS, BLOCK_D], tl.float32)
    noise = tl.zeros([ROWS, BLOCK_D], tl.float32)
    distance = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        if not WHOLE:
            col = start + tl.arange(0, BLOCK_D)[None, :]
            mask = live[:, None] & (col < D)
            centred = _load(h_ptr + source + col, mask & inside) - mean[:, None]
            pred = _load(pred_ptr + at + col, mask)
            noised = _load(noised_ptr + at + col, mask) if NOISED else pred
        y = centred * scale
        element, slope = _smooth_l1(pred - y, beta, L1)
        clean += tl.where(mask, element, 0.0)
        if NEED_PRED:
            slope *= slope_pred
            if pull_pred != 0.0:
                slope += pull_pred * (pred - noised)
            tl.store(dpred_ptr + at + col, slope, mask=mask)
        if NOISED:
            element, slope = _smooth_l1(noised - y, beta, L1)
            apart = noised - pred
            noise += tl.where(mask, element, 0.0)
            distance += tl.where(mask, apart * apart, 0.0)
            if NEED_NOISED:
                slope *= slope_noised
                if pull_noised != 0.0:
                    slope += pull_noised * apart
                tl.store(dnoised_ptr + at + col, slope, mask=mask)
    tl.store(partial_ptr + 3 * program, _sum_of_all(clean) / D)
    if NOISED:
        tl.store(partial_ptr + 3 * program + 1, _sum_of_all(noise) / D)
        tl.store(partial_ptr + 3 * program + 2, _sum_of_all(distance) / D)


@triton.jit(do_not_specialize=["programs", "n_rows", "noise_weight", "consistency"])
def _jepa_loss_terms_kernel(
    loss_ptr,
    terms_ptr,
    partial_ptr,
    programs,
    n_rows,
    noise_weight,
    consistency,
    NOISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the order of the sums does not depend on the device."""
    at = tl.arange(0, BLOCK)
    clean = tl.zeros([BLOCK], tl.float32)
    noise = tl.zeros([BLOCK], tl.float32)
    distance = tl.zeros([BLOCK], tl.float32)
    for first in range(0, programs, BLOCK):
        mask = first + at < programs
        row = partial_ptr + 3 * (first + at)
        clean += tl.load(row, mask=mask, other=0.0)
        if NOISED:
            noise += tl.load(row + 1, mask=mask, other=0.0)
            distance += tl.load(row + 2, mask=mask, other=0.0)
    # 0 / 0, not a number, for a batch without targets: as the mean over nothing.
    count = n_rows.to(tl.float32)
    loss = tl.sum(clean, axis=0) / count
    if NOISED:
        tl.store(terms_ptr, loss)
        noise_mean = tl.sum(noise, axis=0) / count
        distance_mean = tl.sum(distance, axis=0) / count
        tl.store(terms_ptr + 1, noise_mean)
        tl.store(terms_ptr + 2, distance_mean)
        loss += noise_weight * noise_mean + consistency * distance_mean
    tl.store(loss_ptr, loss)


@triton.jit
def _scale(out_ptr, slope_ptr, factor, start, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    mask = start + at < count
    slope = tl.load(slope_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + at, slope * factor, mask=mask)


@triton.jit(do_not_specialize=["scale"])
def _jepa_loss_bwd_kernel(
    out_ptr,
    slope_ptr,
    other_out_ptr,
    other_slope_ptr,
    grad_ptr,
    count,
    scale,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = slope * factor for one or two tensors; in place and times 1 nothing is touched."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # The factor in fp32: rounded to bf16 it would bias every gradient by the same amount.
    factor = tl.load(grad_ptr).to(tl.float32) * scale
    if (not IN_PLACE) or factor != 1.0:
        if tl.program_id(1) == 0:
            _scale(out_ptr, slope_ptr, factor, start, count, BLOCK)
        else:
            _scale(other_out_ptr, other_slope_ptr, factor, start, count, BLOCK)


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
    batch, n_blocks, n_targets = target_idx.shape
    _, n, width = h.shape
    n_rows = target_idx.numel()
    two = noised is not None
    place = "jepa_loss_fwd_noised" if two else "jepa_loss_fwd"
    tile = tuned(place, row_tile(width), width, pred.dtype, h.dtype)
    programs = cdiv(n_rows, tile.rows)
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    terms = loss.new_empty(3 if two else 0)
    partial = loss.new_empty(programs, 3)
    dpred = torch.empty_like(pred) if need_pred else pred.new_empty(0)
    dnoised = torch.empty_like(pred) if need_noised else pred.new_empty(0)
    launch(
        _jepa_loss_fwd_kernel,
        (programs,),
        partial,
        dpred,
        dnoised,
        pred,
        noised,
        h,
        target_idx,
        n_rows,
        batch,
        n_blocks,
        n_targets,
        n,
        scale,
        scale * noise_weight,
        pull_pred,
        pull_noised,
        beta,
        eps,
        D=width,
        L1=beta == 0.0,
        NOISED=two,
        NEED_PRED=need_pred,
        NEED_NOISED=need_noised,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    launch(
        _jepa_loss_terms_kernel,
        (1,),
        loss,
        terms,
        partial,
        programs,
        n_rows,
        noise_weight,
        consistency,
        NOISED=two,
        BLOCK=1024,
        num_warps=8,
    )
    return loss, terms, dpred, dnoised


def backward(
    grad: torch.Tensor, slopes: list[torch.Tensor], out: list[torch.Tensor], scale: float
) -> None:
    """out = slopes * (grad * scale); where out is slopes and the factor 1, nothing is touched."""
    count = slopes[0].numel()
    launch(
        _jepa_loss_bwd_kernel,
        (cdiv(count, _ELEMENTS), len(slopes)),
        out[0],
        slopes[0],
        out[-1],
        slopes[-1],
        grad,
        count,
        scale,
        IN_PLACE=out[0] is slopes[0],
        BLOCK=_ELEMENTS,
        num_warps=4,
    )
