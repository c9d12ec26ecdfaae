"""Triton kernel of ema_update_: one launch for all tensors, through rows of addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..._runtime.address_rows import addresses, aligned, first_programs, rows
from ..._runtime.launch import launch

_ELEMENTS = 4096  # per program


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


def _update_group(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    rest: float,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """Contiguous tensors, all sources of one type."""
    device = targets[0].device
    lists = [addresses(t) for t in (targets, sources, targets if shadow is None else shadow)]
    sizes = tuple(target.numel() for target in targets)
    *first, programs = first_programs(sizes, _ELEMENTS)
    is_tensor = isinstance(momentum, torch.Tensor)
    launch(
        _ema_update_kernel,
        (programs,),
        sources[0],
        *rows(device, (*lists, sizes, tuple(first))),
        momentum if is_tensor else None,
        0.0 if is_tensor else momentum,
        rest,
        len(targets),
        HAS_SHADOW=shadow is not None,
        ALIGNED=aligned(lists),
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
