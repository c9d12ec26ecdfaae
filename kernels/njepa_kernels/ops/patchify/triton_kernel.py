"""Triton kernel of patchify. B images, N patches, K kept patches of P x P pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..._runtime.blocks import copy_tile, tuned
from ..._runtime.launch import cdiv, launch


@triton.jit(do_not_specialize=["n_rows", "n", "k", "columns"])
def _patchify_kernel(
    out_ptr,
    images_ptr,
    idx_ptr,
    n_rows,
    n,
    k,
    columns,
    image_stride,
    line_stride,
    pixel_stride,
    channel_stride,
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Consecutive lanes write consecutive elements and read bytes that lie a pixel apart: the three
    # channels of a pixel come out of the same lines of the cache.
    AREA: tl.constexpr = P * P
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = row < n_rows
    mask = live[:, None] & (col < 3 * AREA)[None, :]
    patch = row % k
    if idx_ptr is not None:
        index = tl.load(idx_ptr + row, mask=live, other=0)
        # An index out of range reads nothing and gives NaN.
        inside = (index >= 0) & (index < n)
        patch = tl.where(inside, index, 0).to(tl.int32)
    corner = (
        (row // k).to(tl.int64) * image_stride
        + (patch // columns).to(tl.int64) * (P * line_stride)
        + (patch % columns).to(tl.int64) * (P * pixel_stride)
    )
    channel, place = col // AREA, col % AREA
    within = (
        channel.to(tl.int64) * channel_stride
        + (place // P).to(tl.int64) * line_stride
        + (place % P).to(tl.int64) * pixel_stride
    )
    x = tl.load(images_ptr + corner[:, None] + within[None, :], mask=mask, other=0)
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
    value = x.to(tl.float32) * scale[None, :] + shift[None, :]
    out = out_ptr + (row.to(tl.int64) * (3 * AREA))[:, None] + col[None, :]
    if idx_ptr is not None:
        value = tl.where(inside[:, None], value, float("nan"))
    tl.store(out, value, mask=mask)


def forward(
    images: torch.Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    idx: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """images [B,H,W,3] of any strides, idx [B,K] contiguous or None -> [B,K,3pp]."""
    batch, height, width, _ = images.shape
    columns = width // patch_size
    n = height // patch_size * columns
    k = n if idx is None else idx.shape[1]
    length = 3 * patch_size * patch_size
    out = images.new_empty(batch, k, length, dtype=out_dtype)
    # 128 columns whatever the length: of two blocks of 512 half would be idle at 588 (14 x 14).
    tile = tuned("patchify", copy_tile(128, out_dtype), length, out_dtype)
    launch(
        _patchify_kernel,
        (cdiv(batch * k, tile.rows), cdiv(length, tile.block_d)),
        out,
        images,
        idx,
        batch * k,
        n,
        k,
        columns,
        *images.stride(),
        *scale,
        *shift,
        P=patch_size,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return out
