"""The second stage of a sum over rows without atomics: rows of partial sums to one.

How many rows of the input each partial sum covers depends on their number alone, so the order of
the additions is that of every GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch

_PROGRAMS = 512  # of the first stage at most: they fill a device, and are soon summed
_LEAST = 32  # rows of a program at least, or its partial sum costs more than 2 % of its reads


def rows_per_program(n_rows: int, multiple: int) -> int:
    """How many rows a program of the first stage takes, ``multiple`` at a time."""
    return cdiv(max(_LEAST, cdiv(n_rows, _PROGRAMS)), multiple) * multiple


@triton.jit(do_not_specialize=["n_rows", "width"])
def _column_sums_kernel(out_ptr, in_ptr, n_rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, n_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & (col < width)[None, :]
        at = (row.to(tl.int64) * width)[:, None] + col[None, :]
        total += tl.load(in_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0), mask=col < width)


def column_sums(partial: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, width] to [width]; zeros for no rows."""
    n_rows, width = partial.shape
    out = partial.new_empty(width)
    launch(
        _column_sums_kernel,
        (cdiv(width, 32),),
        out,
        partial,
        n_rows,
        width,
        ROWS=64,
        COLS=32,
        num_warps=4,
    )
    return out
