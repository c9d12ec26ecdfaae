"""Triton kernel of ema_update_: one launch for all tensors, through rows of addresses.

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

from ..._runtime.launch import cdiv, launch

_ELEMENTS = 4096  # per program
_ALIGNMENT = 16  # bytes, of the widest access
_ROWS = 256  # of addresses or sizes, that are kept on the device: five for a list of tensors
_VALUES = 128  # of a row, that one launch writes: 1 KB of the 4 KB of arguments
_BIAS = tl.constexpr(1 << 62)


@triton.jit
def _update_block(
    target,
    source,
    shadow,
    keep,
    take,
    size,
    MASKED: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    mask = at < size if MASKED else None
    value = tl.load(target + at, mask=mask) * keep
    value += tl.load(source + at, mask=mask).to(tl.float32) * take
    tl.store(target + at, value, mask=mask)
    if HAS_SHADOW:
        tl.store(shadow + at, value.to(tl.bfloat16), mask=mask)


@triton.jit
def _write_row_kernel(row_ptr, values, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(row_ptr + i, (values[i] - _BIAS) >> 1)


def _encoded(value: int) -> int:
    """An odd number of 64 bits: Triton recompiles for 1, for multiples of 16 and for 32 bits."""
    return (1 << 62) + 2 * value + 1


@triton.jit(do_not_specialize=["momentum", "rest", "n_tensors"])
def _ema_update_kernel(
    like_source,
    target_ptr,
    source_ptr,
    shadow_ptr,
    size_ptr,
    first_ptr,
    momentum_ptr,
    momentum,
    rest,
    n_tensors,
    HAS_SHADOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows [n_tensors] of addresses, sizes and first programs, of which none is the same."""
    pid = tl.program_id(0)
    each = tl.arange(0, TENSORS)
    first = tl.load(first_ptr + each, mask=each < n_tensors, other=9223372036854775807)
    tensor = tl.sum((first <= pid).to(tl.int32), axis=0) - 1
    target = tl.load(target_ptr + tensor).to(tl.pointer_type(tl.float32))
    source = tl.load(source_ptr + tensor).to(tl.pointer_type(like_source.dtype.element_ty))
    shadow = tl.load(shadow_ptr + tensor).to(tl.pointer_type(tl.bfloat16))
    size = tl.load(size_ptr + tensor)
    start = (pid - tl.load(first_ptr + tensor)) * BLOCK
    target += start
    source += start
    shadow += start
    if ALIGNED:
        target = tl.multiple_of(target, 16)
        source = tl.multiple_of(source, 16)
        shadow = tl.multiple_of(shadow, 16)
    if momentum_ptr is not None:
        m = tl.load(momentum_ptr)
        keep = m.to(tl.float32)
        take = (1.0 - m).to(tl.float32)
    else:
        keep = momentum
        take = rest
    # A mask whose end the compiler does not know would make every access a scalar one.
    if size - start >= BLOCK:
        _update_block(target, source, shadow, keep, take, BLOCK, False, HAS_SHADOW, BLOCK)
    else:
        _update_block(target, source, shadow, keep, take, size - start, True, HAS_SHADOW, BLOCK)


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


def _update_group(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    rest: float,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """Contiguous tensors, all sources of one type."""
    device = targets[0].device
    lists = (targets, sources, targets if shadow is None else shadow)
    addresses = [tuple(tensor.data_ptr() for tensor in tensors) for tensors in lists]
    sizes = tuple(target.numel() for target in targets)
    first = [0]
    for size in sizes:
        first.append(first[-1] + cdiv(size, _ELEMENTS))
    stream = _keeping_stream(device)
    rows = [
        _written(device, row) if stream is None else _kept(device, stream, row)
        for row in (*addresses, sizes, tuple(first[:-1]))
    ]
    is_tensor = isinstance(momentum, torch.Tensor)
    launch(
        _ema_update_kernel,
        (first[-1],),
        sources[0],
        *rows,
        momentum if is_tensor else None,
        0.0 if is_tensor else momentum,
        rest,
        len(targets),
        HAS_SHADOW=shadow is not None,
        ALIGNED=all(reduce(or_, row) % _ALIGNMENT == 0 for row in addresses),
        TENSORS=triton.next_power_of_2(len(targets)),
        BLOCK=_ELEMENTS,
        num_warps=8,
    )


def update(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    rest: float,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """One launch per (device, type of the sources); all tensors contiguous.

    A momentum that is a tensor is on a device and stays there; then ``rest`` is not used.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, source in enumerate(sources):
        if source.numel():
            groups.setdefault((source.device, source.dtype), []).append(i)
    for (device, _), members in groups.items():
        _update_group(
            [targets[i] for i in members],
            [sources[i] for i in members],
            momentum.to(device) if isinstance(momentum, torch.Tensor) else momentum,
            rest,
            None if shadow is None else [shadow[i] for i in members],
        )
