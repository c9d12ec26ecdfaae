"""Triton kernel of ema_update_: one launch for all tensors, through a table of addresses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .._triton import cdiv, launch

_ELEMENTS = 4096  # per program
_ALIGNMENT = 16  # bytes, of the widest access
_TABLES = 64  # lists of tensors whose tables are kept on the device


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


@triton.jit(do_not_specialize=["momentum", "rest", "n_tensors"])
def _ema_update_kernel(
    like_source,
    table_ptr,
    owner_ptr,
    momentum_ptr,
    momentum,
    rest,
    n_tensors,
    HAS_SHADOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """table: rows target, source, shadow, size, first program; owner: program -> tensor."""
    pid = tl.program_id(0)
    tensor = tl.load(owner_ptr + pid)
    entry = table_ptr + tensor
    target = tl.load(entry).to(tl.pointer_type(tl.float32))
    source = tl.load(entry + n_tensors).to(tl.pointer_type(like_source.dtype.element_ty))
    shadow = tl.load(entry + 2 * n_tensors).to(tl.pointer_type(tl.bfloat16))
    size = tl.load(entry + 3 * n_tensors)
    start = (pid - tl.load(entry + 4 * n_tensors)) * BLOCK
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


@lru_cache(maxsize=_TABLES)
def _table(
    device: torch.device, addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table and the owners on ``device``.

    Kept, so that only the first call with these tensors copies from the host: the later ones can be
    captured in a CUDA graph.
    """
    programs = [cdiv(size, _ELEMENTS) for size in sizes]
    first = [0]
    for count in programs[:-1]:
        first.append(first[-1] + count)
    table = torch.tensor([*addresses, sizes, first], dtype=torch.int64)
    owner = torch.repeat_interleave(
        torch.arange(len(sizes), dtype=torch.int32), torch.tensor(programs)
    )
    return table.to(device), owner.to(device)


def _update_group(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """Contiguous tensors, all sources of one type."""
    lists = (targets, sources, targets if shadow is None else shadow)
    addresses = tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in lists)
    aligned = all(address % _ALIGNMENT == 0 for row in addresses for address in row)
    sizes = tuple(target.numel() for target in targets)
    table, owner = _table(targets[0].device, addresses, sizes)
    is_tensor = isinstance(momentum, torch.Tensor)
    launch(
        _ema_update_kernel,
        (owner.numel(),),
        sources[0],
        table,
        owner,
        momentum if is_tensor else None,
        0.0 if is_tensor else momentum,
        0.0 if is_tensor else 1.0 - momentum,
        len(targets),
        HAS_SHADOW=shadow is not None,
        ALIGNED=aligned,
        BLOCK=_ELEMENTS,
        num_warps=8,
    )


def update(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """One launch per (device, type of the sources); all tensors contiguous."""
    if isinstance(momentum, torch.Tensor) and momentum.device != targets[0].device:
        momentum = momentum.to(targets[0].device)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, source in enumerate(sources):
        if source.numel():
            groups.setdefault((source.device, source.dtype), []).append(i)
    for members in groups.values():
        _update_group(
            [targets[i] for i in members],
            [sources[i] for i in members],
            momentum,
            None if shadow is None else [shadow[i] for i in members],
        )
