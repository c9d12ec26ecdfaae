"""Triton kernel of adamw_ema_: one launch for all tensors, through rows of addresses.

What depends on the step is computed before it by small kernels in fp64, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._runtime.address_rows import addresses, aligned, first_programs, rows
from ..._runtime.launch import launch
from .reference import factors, is_bad

_ELEMENTS = 1024  # per program


@triton.jit
def _update_block(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    target,
    param_low,
    target_low,
    step_size,
    root,
    decay,
    keep,
    take,
    scale,
    take1,
    beta2,
    take2,
    eps,
    size,
    MASKED: tl.constexpr,
    NEAR: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_PARAM_LOW: tl.constexpr,
    HAS_TARGET_LOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    mask = at < size if MASKED else None
    g = tl.load(grad + at, mask=mask).to(tl.float32) * scale
    old = tl.load(exp_avg + at, mask=mask)
    # As torch.lerp: from the nearer end.
    m = tl.fma(g - old, take1 if NEAR else take1 - 1.0, old if NEAR else g)
    v = tl.fma(g * take2, g, tl.load(exp_avg_sq + at, mask=mask) * beta2)
    move = tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    p = tl.load(param + at, mask=mask) * decay - move
    tl.store(exp_avg + at, m, mask=mask)
    tl.store(exp_avg_sq + at, v, mask=mask)
    tl.store(param + at, p, mask=mask)
    if HAS_PARAM_LOW:
        tl.store(param_low + at, p.to(tl.bfloat16), mask=mask)
    if HAS_TARGET:
        mean = tl.fma(p, take, tl.load(target + at, mask=mask) * keep)
        tl.store(target + at, mean, mask=mask)
        if HAS_TARGET_LOW:
            tl.store(target_low + at, mean.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=["take1", "beta2", "take2", "eps", "n_tensors"])
def _adamw_ema_kernel(
    like_grad,
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    target_ptr,
    param_low_ptr,
    target_low_ptr,
    size_ptr,
    first_ptr,
    step_size_ptr,
    root_ptr,
    common_ptr,
    take1,
    beta2,
    take2,
    eps,
    n_tensors,
    NEAR: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_PARAM_LOW: tl.constexpr,
    HAS_TARGET_LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows [n_tensors] of addresses, sizes and first programs: an empty one's is that after it."""
    if tl.load(common_ptr + 4) != 0.0:
        return
    pid = tl.program_id(0)
    each = tl.arange(0, TENSORS)
    first = tl.load(first_ptr + each, mask=each < n_tensors, other=9223372036854775807)
    tensor = tl.sum((first <= pid).to(tl.int32), axis=0) - 1
    start = (pid - tl.load(first_ptr + tensor)) * BLOCK
    param = tl.load(param_ptr + tensor).to(tl.pointer_type(tl.float32)) + start
    grad = tl.load(grad_ptr + tensor).to(tl.pointer_type(like_grad.dtype.element_ty)) + start
    exp_avg = tl.load(exp_avg_ptr + tensor).to(tl.pointer_type(tl.float32)) + start
    exp_avg_sq = tl.load(exp_avg_sq_ptr + tensor).to(tl.pointer_type(tl.float32)) + start
    target = tl.load(target_ptr + tensor).to(tl.pointer_type(tl.float32)) + start
    param_low = tl.load(param_low_ptr + tensor).to(tl.pointer_type(tl.bfloat16)) + start
    target_low = tl.load(target_low_ptr + tensor).to(tl.pointer_type(tl.bfloat16)) + start
    if ALIGNED:
        param = tl.multiple_of(param, 16)
        grad = tl.multiple_of(grad, 16)
        exp_avg = tl.multiple_of(exp_avg, 16)
        exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
        target = tl.multiple_of(target, 16)
        param_low = tl.multiple_of(param_low, 16)
        target_low = tl.multiple_of(target_low, 16)
    size = tl.load(size_ptr + tensor) - start
    step_size = tl.load(step_size_ptr + tensor)
    root = tl.load(root_ptr + tensor)
    decay = tl.load(common_ptr)
    keep = tl.load(common_ptr + 1)
    take = tl.load(common_ptr + 2)
    scale = tl.load(common_ptr + 3)
    # A mask whose end the compiler does not know would make every access a scalar one.
    if size >= BLOCK:
        _update_block(
            param, grad, exp_avg, exp_avg_sq, target, param_low, target_low, step_size, root,
            decay, keep, take, scale, take1, beta2, take2, eps, size,
            False, NEAR, HAS_TARGET, HAS_PARAM_LOW, HAS_TARGET_LOW, BLOCK,
        )  # fmt: skip
    else:
        _update_block(
            param, grad, exp_avg, exp_avg_sq, target, param_low, target_low, step_size, root,
            decay, keep, take, scale, take1, beta2, take2, eps, size,
            True, NEAR, HAS_TARGET, HAS_PARAM_LOW, HAS_TARGET_LOW, BLOCK,
        )  # fmt: skip


def _on(device: torch.device, x: Tensor | None) -> Any:
    """``x``, which the host need not move: one of the CPU acts as a number."""
    return x if x is None or x.is_cpu or x.device == device else x.to(device)


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    targets: Sequence[Tensor],
    params_bf16: Sequence[Tensor],
    targets_bf16: Sequence[Tensor],
    lr: Tensor,
    betas: Sequence[float],
    eps: float,
    weight_decay: Tensor,
    momentum: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One launch per (device, type of the gradients); all tensors contiguous."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        groups.setdefault((grad.device, grad.dtype), []).append(i)
    lists = (params, grads, exp_avgs, exp_avg_sqs, targets, params_bf16, targets_bf16)
    for (device, _), members in groups.items():
        numbers = [_on(device, x) for x in (lr, weight_decay, momentum, scale, found_inf)]
        counts = [steps[i] for i in members]
        bad = is_bad(numbers[4], counts[0])
        torch._foreach_add_(counts, [(~bad).float()] * len(counts))
        f = factors(counts, numbers[0], (betas[0], betas[1]), *numbers[1:4])
        common = torch.stack((f.decay, f.keep, f.take, f.scale, bad.double())).float()
        chosen = [[some[i] for i in members] if some else [] for some in lists]
        sizes = tuple(param.numel() for param in chosen[0])
        *first, programs = first_programs(sizes, _ELEMENTS)
        # Of what is not there, the addresses are not used.
        where = [addresses(some or chosen[0]) for some in chosen]
        launch(
            _adamw_ema_kernel,
            (programs,),
            chosen[1][0],
            *rows(device, (*where, sizes, tuple(first))),
            f.step_size.float(),
            f.root.float(),
            common,
            1.0 - betas[0],
            betas[1],
            1.0 - betas[1],
            eps,
            len(members),
            NEAR=1.0 - betas[0] < 0.5,
            HAS_TARGET=bool(targets),
            HAS_PARAM_LOW=bool(params_bf16),
            HAS_TARGET_LOW=bool(targets_bf16),
            ALIGNED=aligned(where),
            TENSORS=triton.next_power_of_2(len(members)),
            BLOCK=_ELEMENTS,
            num_warps=4,
        )
