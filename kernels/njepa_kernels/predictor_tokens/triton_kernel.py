"""Triton kernels of predictor_tokens.

B batch, M target blocks, Kc context tokens, Kt targets per block, N patches, D width. Rows are
counted in int32 (a 64-bit division costs 100 instructions), addresses in int64. The factor C is
0, 1, 2 for the mixes ve, vp, edm: query = mask_token + (psi + s n) / sqrt(1 + C s^2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._blocks import SCATTER_REGISTERS, copy_tile, index_block, row_tile, scatter_tile, tuned
from .._triton import add_matching_rows, as_int32, cdiv, launch, normals

_FACTOR = {"ve": 0, "vp": 1, "edm": 2}
_SCALARS = ["seed", "step", "batch", "n_blocks", "n_context", "n_targets", "context_tiles"]


@triton.jit
def _scale(s, C: tl.constexpr):
    """1 / sqrt(1 + C s^2), exactly 1 where s = 0."""
    return tl.div_rn(1.0, tl.sqrt_rn(1.0 + C * s * s))


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
    batch,
    n_blocks,
    n_context,
    n_targets,
    context_tiles,
    D: tl.constexpr,
    C: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
        psi = tl.load(pos_ptr + (patch * D)[:, None] + col[None, :], mask=mask, other=0.0)
        value = (token.to(tl.float32) + psi.to(tl.float32)).to(out_ptr.dtype.element_ty)
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
        query = tl.load(pos_ptr + (patch * D)[:, None] + col[None, :], mask=mask, other=0.0)
        query = query.to(tl.float32)
        if HAS_SIGMA:
            s = tl.load(sigma_ptr + row, mask=live, other=0.0)
            # Clean blocks are common; they draw nothing.
            if tl.max((s != 0.0).to(tl.int32), axis=0) > 0:
                sample = tl.load(sample_ids_ptr + b, mask=live, other=0)
                group = tl.program_id(1) * (BLOCK_D // 4)
                noise = normals(sample, m, patch, seed, step, group, ROWS, BLOCK_D // 4)
                query += s[:, None] * noise
                if C > 0:
                    query *= _scale(s, C)[:, None]
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
    pos_ptr,
    target_idx_ptr,
    sigma_ptr,
    sample_ids_ptr,
    seed,
    step,
    batch,
    n_blocks,
    n_context,
    n_targets,
    per_program,
    D: tl.constexpr,
    C: tl.constexpr,
    NEED_SIGMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """First stage of dmask_token: one partial sum per program; and dsigma, row by row."""
    pid = tl.program_id(0)
    col = tl.arange(0, BLOCK_D)
    in_width = col < D
    n_rows = batch * n_blocks * n_targets
    total = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(0, per_program):
        row = (pid * per_program + tile) * ROWS + tl.arange(0, ROWS)
        live = row < n_rows
        mask = live[:, None] & in_width[None, :]
        b = row // (n_blocks * n_targets)
        m = (row // n_targets) % n_blocks
        out_row = (m * batch + b).to(tl.int64) * (n_context + n_targets)
        source = (out_row + n_context + row % n_targets) * D
        grad = tl.load(grad_ptr + source[:, None] + col[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        total += tl.sum(grad, axis=0)
        if NEED_SIGMA:
            s = tl.load(sigma_ptr + row, mask=live, other=0.0)
            patch = tl.load(target_idx_ptr + row, mask=live, other=0)
            sample = tl.load(sample_ids_ptr + b, mask=live, other=0)
            slope = normals(sample, m, patch, seed, step, 0, ROWS, BLOCK_D // 4)
            scale = _scale(s, C)
            if C > 0:
                # d/ds (psi + s n) (1 + C s^2)^(-1/2) = (n - C s psi) (1 + C s^2)^(-3/2)
                psi = tl.load(pos_ptr + (patch * D)[:, None] + col[None, :], mask=mask, other=0.0)
                slope -= (C * s)[:, None] * psi.to(tl.float32)
            dsigma = tl.sum(grad * slope, axis=1) * scale * scale * scale
            tl.store(dsigma_ptr + row, dsigma, mask=live)
    tl.store(partial_ptr + pid.to(tl.int64) * D + col, total, mask=in_width)


@triton.jit(do_not_specialize=["batch", "n_blocks", "n", "n_context", "n_targets", "per_chunk"])
def _predictor_tokens_bwd_pos_kernel(
    partial_ptr,
    grad_ptr,
    context_idx_ptr,
    target_idx_ptr,
    sigma_ptr,
    batch,
    n_blocks,
    n,
    n_context,
    n_targets,
    per_chunk,
    D: tl.constexpr,
    C: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KC: tl.constexpr,
    BLOCK_KT: tl.constexpr,
):
    """First stage of dpos: each program owns ROWS patches of the samples of one chunk."""
    NONE: tl.constexpr = 2147483647
    tiles = tl.cdiv(n, ROWS)
    pid = tl.program_id(0)
    chunk = (pid // tiles).to(tl.int64)
    patch = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = col < D
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    length = n_context + n_targets
    for b in range(chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, batch)):
        for m in range(0, n_blocks):
            table = grad_ptr + (b + m * batch) * length * D
            for start in range(0, n_context, BLOCK_KC):
                ks = start + tl.arange(0, BLOCK_KC)
                ids = tl.load(context_idx_ptr + b * n_context + ks, mask=ks < n_context, other=-1)
                acc = add_matching_rows(acc, table, ids, ks, patch, col, in_width, D)
            first_target = (b * n_blocks + m) * n_targets
            for start in range(0, n_targets, BLOCK_KT):
                ks = start + tl.arange(0, BLOCK_KT)
                ids = tl.load(target_idx_ptr + first_target + ks, mask=ks < n_targets, other=-1)
                match = ids[None, :] == patch[:, None]
                for _ in range(tl.max(tl.sum(match.to(tl.int32), axis=1), axis=0)):
                    t = tl.min(tl.where(match, ks[None, :], NONE), axis=1)
                    found = t != NONE
                    rows = table + ((n_context + t.to(tl.int64)) * D)[:, None] + col[None, :]
                    keep = found[:, None] & in_width[None, :]
                    grad = tl.load(rows, mask=keep, other=0.0).to(tl.float32)
                    if HAS_SIGMA and C > 0:
                        s = tl.load(sigma_ptr + first_target + t, mask=found, other=0.0)
                        grad *= _scale(s, C)[:, None]
                    acc += grad
                    match = match & (ks[None, :] > t[:, None])
    rows = (chunk * n + patch) * D
    mask = (patch < n)[:, None] & in_width[None, :]
    tl.store(partial_ptr + rows[:, None] + col[None, :], acc, mask=mask)


def forward(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    seed: int,
    step: int,
    sample_ids: torch.Tensor | None,
    mix: str,
) -> torch.Tensor:
    """[M*B, Kc+Kt, D] in the type of ``context``; all contiguous, sigma fp32 [B,M,Kt] or None."""
    batch, n_context, width = context.shape
    _, n_blocks, n_targets = target_idx.shape
    out = context.new_empty(n_blocks * batch, n_context + n_targets, width)
    # The noise needs registers: a smaller tile keeps more programs resident.
    tile = copy_tile(width, context.dtype, 8192 if sigma is None else 4096)
    noisy = "clean" if sigma is None else mix
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
        sample_ids if sigma is not None else None,
        as_int32(seed),
        as_int32(step),
        batch,
        n_blocks,
        n_context,
        n_targets,
        context_tiles,
        D=width,
        C=_FACTOR[mix],
        HAS_SIGMA=sigma is not None,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return out


def backward(
    grad: torch.Tensor,
    pos: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    seed: int,
    step: int,
    sample_ids: torch.Tensor | None,
    mix: str,
    need_pos: bool,
    need_sigma: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dcontext [B,Kc,D], dmask_token [D] fp32, dpos [N,D] fp32, dsigma [B,M,Kt] fp32).

    The last two are None unless needed. The noise is drawn again; deterministic.
    """
    batch, n_blocks, n_targets = target_idx.shape
    n_context, (n, width) = context_idx.shape[1], pos.shape
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
    tile = tuned(
        "predictor_tokens_bwd_target", row_tile(width), width, grad.dtype, mix if need_sigma else ""
    )
    tiles = cdiv(batch * n_blocks * n_targets, tile.rows)
    per_program = max(1, cdiv(tiles, 1024))
    programs = cdiv(tiles, per_program)
    partial = grad.new_empty((programs, width), dtype=torch.float32)
    dsigma = torch.empty_like(sigma) if need_sigma and sigma is not None else None
    launch(
        _predictor_tokens_bwd_target_kernel,
        (programs,),
        partial,
        dsigma,
        grad,
        pos,
        target_idx,
        sigma,
        sample_ids,
        as_int32(seed),
        as_int32(step),
        *sizes,
        per_program,
        D=width,
        C=_FACTOR[mix],
        NEED_SIGMA=dsigma is not None,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    dpos = _backward_pos(grad, context_idx, target_idx, sigma, mix, n) if need_pos else None
    return dcontext, partial.sum(0), dpos, dsigma


def _backward_pos(
    grad: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    mix: str,
    n: int,
) -> torch.Tensor:
    batch, n_blocks, n_targets = target_idx.shape
    n_context, width = context_idx.shape[1], grad.shape[2]
    tile = tuned("predictor_tokens_bwd_pos", scatter_tile(width), width, grad.dtype)
    chunks = min(batch, max(1, cdiv(1024, cdiv(n, tile.rows))))
    per_chunk = cdiv(batch, chunks) if chunks else 1
    chunks = cdiv(batch, per_chunk)
    partial = grad.new_empty((chunks, n, width), dtype=torch.float32)
    launch(
        _predictor_tokens_bwd_pos_kernel,
        (cdiv(n, tile.rows) * chunks, cdiv(width, tile.block_d)),
        partial,
        grad,
        context_idx,
        target_idx,
        sigma,
        batch,
        n_blocks,
        n,
        n_context,
        n_targets,
        per_chunk,
        D=width,
        C=_FACTOR[mix],
        HAS_SIGMA=sigma is not None,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        BLOCK_KC=index_block(n_context),
        BLOCK_KT=index_block(n_targets),
        maxnreg=SCATTER_REGISTERS,
        num_warps=tile.num_warps,
    )
    return partial.sum(0)
