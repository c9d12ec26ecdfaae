"""Triton kernels of predictor_tokens.

B batch, M target blocks, Kc context tokens, Kt targets per block, N patches, D width. Rows are
counted in int32 (a 64-bit division costs 100 instructions), addresses in int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._runtime.blocks import copy_tile, row_tile, tuned
from ..._runtime.by_index import sum_by_index
from ..._runtime.launch import as_int32, cdiv, launch
from ..._runtime.philox import NoiseKey, words_of
from ..._runtime.triton_noise import normals

_SCALARS = ["seed", "step", "batch", "n_blocks", "n", "n_context", "n_targets", "context_tiles"]


@triton.jit
def _position(pos_ptr, patch, n, col, mask, D: tl.constexpr):
    """Rows of the table in fp32; an index out of range reads nothing and gives NaN."""
    read = mask & ((patch >= 0) & (patch < n))[:, None]
    at = pos_ptr + (patch * D)[:, None] + col[None, :]
    return tl.load(at, mask=read, other=float("nan")).to(tl.float32)


@triton.jit(do_not_specialize=_SCALARS)
def _predictor_tokens_fwd_kernel(
    out_ptr,
    context_ptr,
    pos_ptr,
    mask_token_ptr,
    context_idx_ptr,
    target_idx_ptr,
    sigma_ptr,
    sample_ids_ptr,
    seed,
    step,
    step_ptr,
    batch,
    n_blocks,
    n,
    n_context,
    n_targets,
    context_tiles,
    D: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if step_ptr is not None:
        step = tl.load(step_ptr).to(tl.int32)
    pid = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = col < D
    length = n_context + n_targets
    if pid < context_tiles:
        # One read of a context token, M writes.
        row = pid * ROWS + tl.arange(0, ROWS)
        live = row < batch * n_context
        mask = live[:, None] & in_width[None, :]
        patch = tl.load(context_idx_ptr + row, mask=live, other=0)
        token = tl.load(
            context_ptr + (row.to(tl.int64) * D)[:, None] + col[None, :], mask=mask, other=0.0
        )
        psi = _position(pos_ptr, patch, n, col, mask, D)
        value = (token.to(tl.float32) + psi).to(out_ptr.dtype.element_ty)
        first = (row // n_context).to(tl.int64)
        for copy in range(0, n_blocks):
            to = ((first + copy * batch) * length + row % n_context) * D
            tl.store(out_ptr + to[:, None] + col[None, :], value, mask=mask)
    else:
        row = (pid - context_tiles) * ROWS + tl.arange(0, ROWS)
        live = row < batch * n_blocks * n_targets
        mask = live[:, None] & in_width[None, :]
        patch = tl.load(target_idx_ptr + row, mask=live, other=0)
        b = row // (n_blocks * n_targets)
        m = (row // n_targets) % n_blocks
        query = _position(pos_ptr, patch, n, col, mask, D)
        if HAS_SIGMA:
            s = tl.load(sigma_ptr + row // n_targets, mask=live, other=0.0)
            # Clean blocks are common; they draw nothing.
            if tl.max((s != 0.0).to(tl.int32), axis=0) > 0:
                sample = tl.load(sample_ids_ptr + b, mask=live, other=0)
                group = tl.program_id(1) * (BLOCK_D // 4)
                block = m * 0 if SHARED else m
                noise = normals(sample, block, patch, seed, step, group, ROWS, BLOCK_D // 4)
                query += s[:, None] * noise
        mask_token = tl.load(mask_token_ptr + col, mask=in_width, other=0.0).to(tl.float32)
        to = ((m * batch + b).to(tl.int64) * length + n_context + row % n_targets) * D
        tl.store(out_ptr + to[:, None] + col[None, :], mask_token[None, :] + query, mask=mask)


@triton.jit(do_not_specialize=["batch", "n_blocks", "n_context", "n_targets"])
def _predictor_tokens_bwd_context_kernel(
    dcontext_ptr,
    grad_ptr,
    batch,
    n_blocks,
    n_context,
    n_targets,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (row < batch * n_context)[:, None] & (col < D)[None, :]
    b = (row // n_context).to(tl.int64)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for m in range(0, n_blocks):
        source = ((b + m * batch) * (n_context + n_targets) + row % n_context) * D
        part = tl.load(grad_ptr + source[:, None] + col[None, :], mask=mask, other=0.0)
        acc += part.to(tl.float32)
    tl.store(dcontext_ptr + (row.to(tl.int64) * D)[:, None] + col[None, :], acc, mask=mask)


@triton.jit(
    do_not_specialize=["seed", "step", "batch", "n_blocks", "n_context", "n_targets", "per_program"]
)
def _predictor_tokens_bwd_target_kernel(
    partial_ptr,
    dsigma_ptr,
    grad_ptr,
    target_idx_ptr,
    sample_ids_ptr,
    seed,
    step,
    step_ptr,
    batch,
    n_blocks,
    n_context,
    n_targets,
    per_program,
    D: tl.constexpr,
    NEED_SIGMA: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """First stage of dmask_token: one partial sum per program; of dsigma: one per row and tile."""
    if step_ptr is not None:
        step = tl.load(step_ptr).to(tl.int32)
    pid, tile = tl.program_id(0), tl.program_id(1)
    col = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = col < D
    n_rows = batch * n_blocks * n_targets
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for turn in range(0, per_program):
        row = (pid * per_program + turn) * ROWS + tl.arange(0, ROWS)
        live = row < n_rows
        mask = live[:, None] & in_width[None, :]
        b = row // (n_blocks * n_targets)
        m = (row // n_targets) % n_blocks
        out_row = (m * batch + b).to(tl.int64) * (n_context + n_targets)
        source = (out_row + n_context + row % n_targets) * D
        grad = tl.load(grad_ptr + source[:, None] + col[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        total += grad
        if NEED_SIGMA:
            patch = tl.load(target_idx_ptr + row, mask=live, other=0)
            sample = tl.load(sample_ids_ptr + b, mask=live, other=0)
            block = m * 0 if SHARED else m
            group = tile * (BLOCK_D // 4)
            noise = normals(sample, block, patch, seed, step, group, ROWS, BLOCK_D // 4)
            dsigma = tl.sum(grad * noise, axis=1)
            tl.store(dsigma_ptr + tile.to(tl.int64) * n_rows + row, dsigma, mask=live)
    tl.store(partial_ptr + pid.to(tl.int64) * D + col, tl.sum(total, axis=0), mask=in_width)


def forward(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    noise: NoiseKey | None,
) -> torch.Tensor:
    """[M*B, Kc+Kt, D] in the type of ``context``; all contiguous, sigma fp32 [B, M] or None."""
    seed, step, step_tensor, sample_ids, shared = words_of(noise)
    batch, n_context, width = context.shape
    _, n_blocks, n_targets = target_idx.shape
    out = context.new_empty(n_blocks * batch, n_context + n_targets, width)
    # The noise needs registers: a smaller tile keeps more programs resident.
    tile = copy_tile(width, context.dtype, 8192 if sigma is None else 4096)
    noisy = "clean" if sigma is None else "noise"
    tile = tuned("predictor_tokens_fwd", tile, width, context.dtype, noisy)
    context_tiles = cdiv(batch * n_context, tile.rows)
    target_tiles = cdiv(batch * n_blocks * n_targets, tile.rows)
    launch(
        _predictor_tokens_fwd_kernel,
        (context_tiles + target_tiles, cdiv(width, tile.block_d)),
        out,
        context,
        pos,
        mask_token,
        context_idx,
        target_idx,
        sigma,
        sample_ids,
        as_int32(seed),
        as_int32(step),
        step_tensor,
        batch,
        n_blocks,
        pos.shape[0],
        n_context,
        n_targets,
        context_tiles,
        D=width,
        HAS_SIGMA=sigma is not None,
        SHARED=shared,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return out


def backward(
    grad: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    noise: NoiseKey | None,
    n: int,
    need_pos: bool,
    need_sigma: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dcontext [B,Kc,D], dmask_token [D] fp32, dpos [n,D] fp32, dsigma [B,M] fp32).

    The last two are None unless needed. The noise is drawn again; deterministic.
    """
    seed, step, step_tensor, sample_ids, shared = words_of(noise)
    batch, n_blocks, n_targets = target_idx.shape
    n_context, width = context_idx.shape[1], grad.shape[2]
    sizes = (batch, n_blocks, n_context, n_targets)
    dcontext = grad.new_empty(batch, n_context, width)
    tile = tuned("predictor_tokens_bwd_context", copy_tile(width, grad.dtype), width, grad.dtype)
    launch(
        _predictor_tokens_bwd_context_kernel,
        (cdiv(batch * n_context, tile.rows), cdiv(width, tile.block_d)),
        dcontext,
        grad,
        *sizes,
        D=width,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    # With noise the sum over a row is one store if a tile holds the row.
    noisy = "noise" if need_sigma else "clean"
    tile = row_tile(width) if need_sigma else copy_tile(width, grad.dtype)
    tile = tuned("predictor_tokens_bwd_target", tile, width, grad.dtype, noisy)
    tiles, columns = cdiv(batch * n_blocks * n_targets, tile.rows), cdiv(width, tile.block_d)
    per_program = max(1, cdiv(tiles * columns, 1024))
    programs = cdiv(tiles, per_program)
    partial = grad.new_empty((programs, width), dtype=torch.float32)
    shape = (columns, *target_idx.shape)
    per_token = grad.new_empty(shape, dtype=torch.float32) if need_sigma else None
    launch(
        _predictor_tokens_bwd_target_kernel,
        (programs, columns),
        partial,
        per_token,
        grad,
        target_idx,
        sample_ids,
        as_int32(seed),
        as_int32(step),
        step_tensor,
        *sizes,
        per_program,
        D=width,
        NEED_SIGMA=need_sigma,
        SHARED=shared,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    dpos = sum_by_index(grad, context_idx, target_idx, n) if need_pos else None
    dsigma = None if per_token is None else per_token.sum((0, 3))
    return dcontext, partial.sum(0), dpos, dsigma
