"""The gradient of a table that tokens point into: rows summed by index, without atomics.

B batch, M blocks, Kc context tokens, Kt targets per block, N patches, D width. The tokens of a
sample are those of its M rows m*B + b of ``grad`` [M*B, Kc+Kt, D]: the context, which is the same
in every block, then the targets of the block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import copy_tile, next_power_of_2, tuned
from .launch import cdiv, launch

_TOKENS, _OTHERS = 32, 64  # so many are compared with so many at once
_PROGRAMS = 1024  # enough to fill a device; depends on no device, so that sums keep their order


@triton.jit
def _index_of(context_idx_ptr, target_idx_ptr, b, token, n_blocks, n, n_context, n_targets):
    """int32 in [-1, n]: whatever is no patch becomes -1 or n."""
    length = n_context + n_targets
    m, place = token // length, token % length
    live = m < n_blocks
    is_context = place < n_context
    context = tl.load(context_idx_ptr + b * n_context + place, mask=live & is_context, other=0)
    at = (b * n_blocks + m) * n_targets + place - n_context
    target = tl.load(target_idx_ptr + at, mask=live & (place >= n_context), other=0)
    index = tl.where(is_context, context, target)
    return tl.minimum(tl.maximum(index, -1), n.to(tl.int64)).to(tl.int32)


@triton.jit(do_not_specialize=["batch", "n_blocks", "n", "n_context", "n_targets", "token_tiles"])
def _invert_index_kernel(
    order_ptr,
    start_ptr,
    context_idx_ptr,
    target_idx_ptr,
    batch,
    n_blocks,
    n,
    n_context,
    n_targets,
    token_tiles,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """order [B, tokens]: the tokens of each sample by index, equal ones in their own order.

    start [N+1, B]: how many of them have a smaller index than each patch. Both are counts of pairs
    (index, token) that come before one; a token whose index is no patch lies before all of
    them or behind.
    """
    b = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tokens = n_blocks * (n_context + n_targets)
    if tile < token_tiles:
        token = tile * BLOCK + tl.arange(0, BLOCK)
        index = _index_of(
            context_idx_ptr, target_idx_ptr, b, token, n_blocks, n, n_context, n_targets
        )
    else:
        index = (tile - token_tiles) * BLOCK + tl.arange(0, BLOCK)
        token = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK, OTHERS], tl.int32)
    for first in range(0, tokens, OTHERS):
        other = first + tl.arange(0, OTHERS)
        found = _index_of(
            context_idx_ptr, target_idx_ptr, b, other, n_blocks, n, n_context, n_targets
        )
        equal = (found[None, :] == index[:, None]) & (other[None, :] < token[:, None])
        before = (found[None, :] < index[:, None]) | equal
        count += (before & (other < tokens)[None, :]).to(tl.int32)
    rank = tl.sum(count, axis=1)
    if tile < token_tiles:
        tl.store(order_ptr + b * tokens + rank, token, mask=token < tokens)
    else:
        tl.store(start_ptr + index.to(tl.int64) * batch + b, rank, mask=index <= n)


@triton.jit(do_not_specialize=["batch", "n_blocks", "n", "n_context", "n_targets", "per_chunk"])
def _sum_by_index_kernel(
    partial_ptr,
    grad_ptr,
    order_ptr,
    start_ptr,
    batch,
    n_blocks,
    n,
    n_context,
    n_targets,
    per_chunk,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program owns some patches; its tile takes a row of each of SAMPLES samples at a time."""
    PATCHES: tl.constexpr = ROWS // SAMPLES
    chunk = tl.program_id(2)
    place = tl.arange(0, ROWS)
    patch = tl.program_id(0) * PATCHES + place // SAMPLES
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = col < D
    length = n_context + n_targets
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in range(chunk * per_chunk, (chunk + 1) * per_chunk):
        b = tile * SAMPLES + place % SAMPLES
        live = (b < batch) & (patch < n)
        first = start_ptr + patch.to(tl.int64) * batch + b
        at = tl.load(first, mask=live, other=0)
        end = tl.load(first + batch, mask=live, other=0)
        order = order_ptr + b.to(tl.int64) * (n_blocks * length)
        for _ in range(0, tl.max(end - at, axis=0)):
            found = at < end
            token = tl.load(order + at, mask=found, other=0)
            row = ((token // length).to(tl.int64) * batch + b) * length + token % length
            mask = found[:, None] & in_width[None, :]
            part = tl.load(grad_ptr + (row * D)[:, None] + col[None, :], mask=mask, other=0.0)
            acc += part.to(tl.float32)
            at += 1
    total = tl.sum(tl.reshape(acc, [PATCHES, SAMPLES, BLOCK_D]), axis=1)
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    rows = (chunk.to(tl.int64) * n + patch) * D
    mask = (patch < n)[:, None] & in_width[None, :]
    tl.store(partial_ptr + rows[:, None] + col[None, :], total, mask=mask)


def sum_by_index(
    grad: torch.Tensor, context_idx: torch.Tensor | None, target_idx: torch.Tensor, n: int
) -> torch.Tensor:
    """out[j] = sum of the rows of ``grad`` whose index is j: [n, D] fp32.

    grad [M*B, Kc+Kt, D], context_idx int64 [B, Kc] (None: Kc = 0), target_idx int64 [B, M, Kt],
    all contiguous. Duplicates add up, an index outside [0, n) adds nothing. Deterministic.
    """
    batch, n_blocks, n_targets = target_idx.shape
    n_context = 0 if context_idx is None else context_idx.shape[1]
    width, tokens = grad.shape[2], n_blocks * (n_context + n_targets)
    order = target_idx.new_empty((batch, tokens), dtype=torch.int32)
    start = target_idx.new_empty((n + 1, batch), dtype=torch.int32)
    sizes = (batch, n_blocks, n, n_context, n_targets)
    token_tiles = cdiv(tokens, _TOKENS)
    launch(
        _invert_index_kernel,
        (batch, token_tiles + cdiv(n + 1, _TOKENS)),
        order,
        start,
        target_idx if context_idx is None else context_idx,
        target_idx,
        *sizes,
        token_tiles,
        BLOCK=_TOKENS,
        OTHERS=_OTHERS,
        num_warps=4,
    )
    tile = tuned("sum_by_index", copy_tile(width, grad.dtype), width, grad.dtype)
    samples = min(tile.rows, next_power_of_2(batch))
    patch_tiles, sample_tiles = cdiv(n, tile.rows // samples), cdiv(batch, samples)
    columns = cdiv(width, tile.block_d)
    per_chunk = max(1, patch_tiles * columns * sample_tiles // _PROGRAMS)
    chunks = cdiv(sample_tiles, per_chunk)
    partial = grad.new_empty((chunks, n, width), dtype=torch.float32)
    launch(
        _sum_by_index_kernel,
        (patch_tiles, columns, chunks),
        partial,
        grad,
        order,
        start,
        *sizes,
        per_chunk,
        D=width,
        ROWS=tile.rows,
        SAMPLES=samples,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return partial[0] if chunks == 1 else partial.sum(0)
