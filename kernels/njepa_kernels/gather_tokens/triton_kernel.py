"""Triton kernels of gather_tokens. B batch, N patches, K kept tokens, D width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._blocks import SCATTER_REGISTERS, copy_tile, index_block, scatter_tile, tuned
from .._triton import add_matching_rows, cdiv, launch


@triton.jit(do_not_specialize=["n_rows", "n", "k"])
def _gather_tokens_fwd_kernel(
    out_ptr,
    x_ptr,
    idx_ptr,
    pos_ptr,
    n_rows,
    n,
    k,
    D: tl.constexpr,
    HAS_POS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Rows are counted in int32 (a 64-bit division costs 100 instructions), addresses in int64.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = row < n_rows
    mask = live[:, None] & (col < D)[None, :]
    patch = tl.load(idx_ptr + row, mask=live, other=0)
    source = ((row // k).to(tl.int64) * n + patch) * D
    value = tl.load(x_ptr + source[:, None] + col[None, :], mask=mask, other=0.0)
    if HAS_POS:
        psi = tl.load(pos_ptr + (patch * D)[:, None] + col[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32) + psi.to(tl.float32)
    tl.store(out_ptr + (row.to(tl.int64) * D)[:, None] + col[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["batch", "n", "k", "per_chunk"])
def _gather_tokens_bwd_kernel(
    dx_ptr,
    partial_ptr,
    grad_ptr,
    idx_ptr,
    batch,
    n,
    k,
    per_chunk,
    D: tl.constexpr,
    NEED_POS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Each program owns ROWS patches of some samples: dx is written once, without atomics."""
    tiles = tl.cdiv(n, ROWS)
    pid = tl.program_id(0)
    chunk = (pid // tiles).to(tl.int64)
    patch = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = col < D
    mask = (patch < n)[:, None] & in_width[None, :]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for b in range(chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, batch)):
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(0, k, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            ids = tl.load(idx_ptr + b * k + ks, mask=ks < k, other=-1)
            acc = add_matching_rows(acc, grad_ptr + b * k * D, ids, ks, patch, col, in_width, D)
        rows = (b * n + patch).to(tl.int64) * D
        tl.store(dx_ptr + rows[:, None] + col[None, :], acc, mask=mask)
        if NEED_POS:
            total += acc
    if NEED_POS:
        rows = (chunk * n + patch) * D
        tl.store(partial_ptr + rows[:, None] + col[None, :], total, mask=mask)


def forward(x: torch.Tensor, idx: torch.Tensor, pos: torch.Tensor | None) -> torch.Tensor:
    """x [B,N,D], idx [B,K], pos [N,D] or None, contiguous -> [B,K,D]."""
    (_, n, width), (batch, k) = x.shape, idx.shape
    out = x.new_empty(batch, k, width)
    tile = tuned("gather_tokens_fwd", copy_tile(width, x.dtype), width, x.dtype)
    grid = (cdiv(batch * k, tile.rows), cdiv(width, tile.block_d))
    launch(
        _gather_tokens_fwd_kernel,
        grid,
        out,
        x,
        idx,
        pos,
        batch * k,
        n,
        k,
        D=width,
        HAS_POS=pos is not None,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return out


def backward(
    grad: torch.Tensor, idx: torch.Tensor, n: int, need_pos: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """grad [B,K,D] -> (dx [B,N,D] in its type, dpos [N,D] fp32 or None); deterministic."""
    batch, k, width = grad.shape
    dx = grad.new_empty(batch, n, width)
    tile = tuned("gather_tokens_bwd", scatter_tile(width), width, grad.dtype)
    # Enough chunks to fill the device; the number depends on sizes only, so sums keep their order.
    chunks = min(batch, max(1, cdiv(1024, cdiv(n, tile.rows)))) if need_pos else batch
    per_chunk = cdiv(batch, chunks) if chunks else 1
    chunks = cdiv(batch, per_chunk)
    partial = grad.new_empty((chunks, n, width), dtype=torch.float32) if need_pos else None
    grid = (cdiv(n, tile.rows) * chunks, cdiv(width, tile.block_d))
    launch(
        _gather_tokens_bwd_kernel,
        grid,
        dx,
        partial,
        grad,
        idx,
        batch,
        n,
        k,
        per_chunk,
        D=width,
        NEED_POS=need_pos,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        BLOCK_K=index_block(k),
        maxnreg=SCATTER_REGISTERS,
        num_warps=tile.num_warps,
    )
    return dx, partial.sum(0) if partial is not None else None
