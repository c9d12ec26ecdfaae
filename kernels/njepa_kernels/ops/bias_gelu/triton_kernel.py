"""Triton kernels of bias_gelu. Rows [rows, D]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._runtime.blocks import elementwise_tile, tuned
from ..._runtime.column_sums import column_sums, rows_per_program
from ..._runtime.launch import cdiv, launch


@triton.jit
def _gelu(u, TANH: tl.constexpr):
    """The factor g of u in GELU(u) = u g, and the derivative of u g; one exponential for both."""
    if TANH:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), from the exponential that cannot overflow.
        twice = 1.5957691216057308 * (u + 0.044715 * u * u * u)
        e = tl.exp(-tl.abs(twice))
        low = e / (1.0 + e)
        g = tl.where(twice < 0.0, low, 1.0 - low)
        rise = 1.5957691216057308 * (1.0 + 0.134145 * u * u)
        return g, g + u * (low * (1.0 - low)) * rise
    # Phi(-|u|) = exp(-u^2 / 2) t p(t), t = 1 / (1 + .3 |u|): a minimax fit, 1.5e-7 relative.
    e = tl.exp(-0.5 * u * u)
    t = 1.0 / (1.0 + 0.3 * tl.abs(u))
    p = 0.03567488119006157 * t - 0.15720349550247192
    p = p * t + 0.20635415613651276
    p = p * t - 0.053684208542108536
    p = p * t + 0.12856189906597137
    p = p * t + 0.09991341829299927
    p = p * t + 0.12075397372245789
    p = p * t + 0.11962930113077164
    low = p * t * e
    g = tl.where(u < 0.0, low, 1.0 - low)
    return g, g + u * e * 0.3989422804014327


@triton.jit(do_not_specialize=["n_rows"])
def _bias_gelu_fwd_kernel(
    out_ptr,
    x_ptr,
    bias_ptr,
    n_rows,
    D: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (row < n_rows)[:, None] & (col < D)[None, :]
    # Rows are counted in int32, addresses in int64.
    at = (row.to(tl.int64) * D)[:, None] + col[None, :]
    bias = tl.load(bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    g, _ = _gelu(u, TANH)
    tl.store(out_ptr + at, u * g, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "rows_each"])
def _bias_gelu_bwd_kernel(
    dx_ptr,
    partial_ptr,
    grad_ptr,
    x_ptr,
    bias_ptr,
    n_rows,
    rows_each,
    D: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes ``rows_each`` rows, a multiple of ROWS, and leaves their column sums."""
    first = tl.program_id(0) * rows_each
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bias = tl.load(bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & (col < D)[None, :]
        at = (row.to(tl.int64) * D)[:, None] + col[None, :]
        u = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        _, slope = _gelu(u, TANH)
        # A bias that is not finite has no finite slope in the rows behind the last one either.
        du = tl.where(mask, grad * slope, 0.0)
        tl.store(dx_ptr + at, du, mask=mask)
        dbias += du
    at = tl.program_id(0).to(tl.int64) * D + col
    tl.store(partial_ptr + at, tl.sum(dbias, axis=0), mask=col < D)


def forward(x: torch.Tensor, bias: torch.Tensor, tanh: bool) -> torch.Tensor:
    """[rows, D] in the type of ``x``."""
    n_rows, width = x.shape
    out = torch.empty_like(x)
    tile = tuned("bias_gelu_fwd", elementwise_tile(width), width, x.dtype)
    launch(
        _bias_gelu_fwd_kernel,
        (cdiv(n_rows, tile.rows), cdiv(width, tile.block_d)),
        out,
        x,
        bias,
        n_rows,
        D=width,
        TANH=tanh,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return out


def backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [rows, D] in the type of ``x``, dbias [D] in fp32."""
    n_rows, width = x.shape
    dx = torch.empty_like(x)
    tile = tuned("bias_gelu_bwd", elementwise_tile(width), width, x.dtype)
    each = rows_per_program(n_rows, tile.rows)
    programs = cdiv(n_rows, each)
    partial = x.new_empty(programs, width, dtype=torch.float32)
    launch(
        _bias_gelu_bwd_kernel,
        (programs, cdiv(width, tile.block_d)),
        dx,
        partial,
        grad,
        x,
        bias,
        n_rows,
        each,
        D=width,
        TANH=tanh,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return dx, column_sums(partial)
