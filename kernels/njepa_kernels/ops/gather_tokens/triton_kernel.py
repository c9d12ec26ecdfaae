"""Triton kernels of gather_tokens. B batch, N patches, K kept tokens, D width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._runtime.blocks import SCATTER_REGISTERS, copy_tile, index_block, scatter_tile, tuned
from ..._runtime.by_index import sum_by_index
from ..._runtime.launch import cdiv, launch


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
    # An index out of range reads nothing and gives NaN.
    read = mask & ((patch >= 0) & (patch < n))[:, None]
    source = ((row // k).to(tl.int64) * n + patch) * D
    value = tl.load(x_ptr + source[:, None] + col[None, :], mask=read, other=float("nan"))
    if HAS_POS:
        psi = tl.load(pos_ptr + (patch * D)[:, None] + col[None, :], mask=read, other=0.0)
        value = value.to(tl.float32) + psi.to(tl.float32)
    tl.store(out_ptr + (row.to(tl.int64) * D)[:, None] + col[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["n", "k"])
def _gather_tokens_bwd_kernel(
    dx_ptr,
    grad_ptr,
    idx_ptr,
    n,
    k,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Each program owns ROWS patches of a sample: dx is written once, without atomics.

    The rounds over one block of indices: as many as the most frequent one has duplicates; one for
    indices without.
    """
    NONE: tl.constexpr = 2147483647
    tiles = tl.cdiv(n, ROWS)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    patch = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = col < D
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        ids = tl.load(idx_ptr + b * k + ks, mask=ks < k, other=-1)
        match = ids[None, :] == patch[:, None]
        for _ in range(tl.max(tl.sum(match.to(tl.int32), axis=1), axis=0)):
            first = tl.min(tl.where(match, ks[None, :], NONE), axis=1)
            found = first != NONE
            rows = grad_ptr + ((b * k + first) * D)[:, None] + col[None, :]
            mask = found[:, None] & in_width[None, :]
            acc += tl.load(rows, mask=mask, other=0.0).to(tl.float32)
            match = match & (ks[None, :] > first[:, None])
    rows = (b * n + patch) * D
    mask = (patch < n)[:, None] & in_width[None, :]
    tl.store(dx_ptr + rows[:, None] + col[None, :], acc, mask=mask)


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
    launch(
        _gather_tokens_bwd_kernel,
        (cdiv(n, tile.rows) * batch, cdiv(width, tile.block_d)),
        dx,
        grad,
        idx,
        n,
        k,
        D=width,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        BLOCK_K=index_block(k),
        maxnreg=SCATTER_REGISTERS,
        num_warps=tile.num_warps,
    )
    return dx, sum_by_index(grad, None, idx.unsqueeze(1), n) if need_pos else None
