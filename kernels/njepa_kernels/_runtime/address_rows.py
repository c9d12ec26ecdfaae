"""Rows of addresses and sizes on the device, for Triton kernels over many tensors.

The rows reach the device as arguments of a kernel, never as a copy from the host: a copy would make
the host wait (or need pinned memory that outlives every graph that repeats it).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from operator import or_

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch

_ALIGNMENT = 16  # bytes, of the widest access
_ROWS = 256  # of addresses or sizes, that are kept on the device: five to eleven for a list
_VALUES = 128  # of a row, that one launch writes: 1 KB of the 4 KB of arguments
_BIAS = tl.constexpr(1 << 62)


@triton.jit
def _write_row_kernel(row_ptr, values, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(row_ptr + i, (values[i] - _BIAS) >> 1)


def _encoded(value: int) -> int:
    """An odd number of 64 bits: Triton recompiles for 1, for multiples of 16 and for 32 bits."""
    return (1 << 62) + 2 * value + 1


def _written(device: torch.device, values: tuple[int, ...]) -> torch.Tensor:
    row = torch.empty(cdiv(len(values), _VALUES) * _VALUES, dtype=torch.int64, device=device)
    for start in range(0, len(values), _VALUES):
        chunk = tuple(map(_encoded, values[start : start + _VALUES]))
        chunk += (_encoded(0),) * (_VALUES - len(chunk))
        launch(_write_row_kernel, (1,), row[start:], chunk, COUNT=_VALUES, num_warps=1)
    return row


@lru_cache(maxsize=_ROWS)
def _kept(device: torch.device, stream: int, values: tuple[int, ...]) -> torch.Tensor:
    """A row that later calls on this stream find; on another it might not be written yet."""
    return _written(device, values)


def _keeping_stream(device: torch.device) -> int | None:
    """The stream that keeps rows; None: a graph writes its own, in memory that lives as long."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


def rows(device: torch.device, values: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Each as an int64 tensor on ``device``, padded."""
    stream = _keeping_stream(device)
    return [
        _written(device, row) if stream is None else _kept(device, stream, row) for row in values
    ]


def addresses(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def aligned(values: Sequence[tuple[int, ...]]) -> bool:
    """Whether all addresses allow the widest access."""
    return all(reduce(or_, row) % _ALIGNMENT == 0 for row in values)


def first_programs(sizes: Sequence[int], elements: int) -> list[int]:
    """The first program of each tensor, ``elements`` to a program; at the end their number."""
    first = [0]
    for size in sizes:
        first.append(first[-1] + cdiv(size, elements))
    return first
