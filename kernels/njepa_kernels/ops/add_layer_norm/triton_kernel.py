"""Triton kernels of add_layer_norm. Rows [rows, D], each held in registers as a whole."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._runtime.blocks import norm_tile, tuned
from ..._runtime.column_sums import column_sums, rows_per_program
from ..._runtime.launch import cdiv, launch


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows", "eps"])
def _add_layer_norm_fwd_kernel(
    out_ptr,
    total_ptr,
    stats_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    n_rows,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < n_rows
    col = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (col < D)[None, :]
    # Rows are counted in int32, addresses in int64.
    at = (row.to(tl.int64) * D)[:, None] + col[None, :]
    total = _load(x_ptr + at, mask)
    if residual_ptr is not None:
        # Normalised is what is kept, rounded, so that the backward finds the same row.
        kept = (total + _load(residual_ptr + at, mask)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, kept, mask=mask)
        total = kept.to(tl.float32)
    mean = tl.sum(total, axis=1) / D
    centred = tl.where(mask, total - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    inverse = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(stats_ptr + row, mean, mask=live)
    tl.store(stats_ptr + n_rows + row, inverse, mask=live)
    weight = _load(weight_ptr + col, col < D)[None, :]
    bias = _load(bias_ptr + col, col < D)[None, :]
    tl.store(out_ptr + at, centred * inverse[:, None] * weight + bias, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "rows_each"])
def _add_layer_norm_bwd_kernel(
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    grad_ptr,
    grad_total_ptr,
    total_ptr,
    stats_ptr,
    weight_ptr,
    n_rows,
    rows_each,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes ``rows_each`` rows, a multiple of ROWS, and leaves their sums [2, D]."""
    first = tl.program_id(0) * rows_each
    col = tl.arange(0, BLOCK_D)
    weight = _load(weight_ptr + col, col < D)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        live = row < n_rows
        mask = live[:, None] & (col < D)[None, :]
        at = (row.to(tl.int64) * D)[:, None] + col[None, :]
        mean = tl.load(stats_ptr + row, mask=live, other=0.0)[:, None]
        inverse = tl.load(stats_ptr + n_rows + row, mask=live, other=0.0)[:, None]
        grad = _load(grad_ptr + at, mask)
        normed = tl.where(mask, (_load(total_ptr + at, mask) - mean) * inverse, 0.0)
        dweight += grad * normed
        dbias += grad
        slope = grad * weight
        along = tl.sum(slope * normed, axis=1) / D
        level = tl.sum(slope, axis=1) / D
        dtotal = (slope - level[:, None] - normed * along[:, None]) * inverse
        if grad_total_ptr is not None:
            dtotal += _load(grad_total_ptr + at, mask)
        tl.store(dx_ptr + at, dtotal, mask=mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, dtotal, mask=mask)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * D) + col
    tl.store(partial, tl.sum(dweight, axis=0), mask=col < D)
    tl.store(partial + D, tl.sum(dbias, axis=0), mask=col < D)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [rows, D]; the sum, empty without a residual; mean and 1 / std [2, rows]."""
    n_rows, width = x.shape
    out = torch.empty_like(x, dtype=out_dtype)
    total = x.new_empty(0) if residual is None else torch.empty_like(residual)
    stats = x.new_empty(2, n_rows, dtype=torch.float32)
    tile = tuned("add_layer_norm_fwd", norm_tile(width), width, x.dtype, total.dtype)
    launch(
        _add_layer_norm_fwd_kernel,
        (cdiv(n_rows, tile.rows),),
        out,
        total,
        stats,
        x,
        residual,
        weight,
        bias,
        n_rows,
        eps,
        D=width,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return out, total, stats


def backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    x_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx; dresidual where its type is another, else empty; sums for weight and bias [2, D]."""
    n_rows, width = total.shape
    apart = x_dtype != total.dtype
    dx = torch.empty_like(total, dtype=x_dtype)
    dresidual = torch.empty_like(total) if apart else total.new_empty(0)
    tile = tuned("add_layer_norm_bwd", norm_tile(width), width, grad.dtype, total.dtype)
    each = rows_per_program(n_rows, tile.rows)
    programs = cdiv(n_rows, each)
    partial = stats.new_empty(programs, 2 * width)
    launch(
        _add_layer_norm_bwd_kernel,
        (programs,),
        dx,
        dresidual if apart else None,
        partial,
        grad,
        grad_total,
        total,
        stats,
        weight,
        n_rows,
        each,
        D=width,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return dx, dresidual, column_sums(partial).view(2, width)
