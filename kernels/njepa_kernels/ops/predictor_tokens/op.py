"""predictor_tokens: the input of the predictor in one call, with the noise of N-JEPA."""

from __future__ import annotations

from typing import Any

import torch

from ..._runtime.checks import INDEX, check_index_range, check_tensor
from ..._runtime.dispatch import Impl, backend, choose
from ..._runtime.library import refuse_vmap, register
from ..._runtime.philox import NoiseKey, check_noise, words_of
from .reference import predictor_tokens_reference

_OP = "predictor_tokens"
_Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _key(
    seed: int,
    step: int,
    step_tensor: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    shared: bool,
) -> NoiseKey | None:
    """The key, of which an operator's schema knows the parts only; without ids nothing is drawn."""
    if sample_ids is None:
        return None
    when = step if step_tensor is None else step_tensor
    return NoiseKey(seed, when, sample_ids.contiguous(), shared)


def _forward(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    seed: int,
    step: int,
    step_tensor: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    shared: bool,
    impl: str,
) -> torch.Tensor:
    out: torch.Tensor = backend(_OP, impl, context).forward(
        context.contiguous(),
        pos.contiguous(),
        mask_token.contiguous(),
        context_idx.contiguous(),
        target_idx.contiguous(),
        None if sigma is None else sigma.contiguous(),
        _key(seed, step, step_tensor, sample_ids, shared),
    )
    return out


def _forward_fake(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    *rest: Any,
) -> torch.Tensor:
    batch, n_blocks, n_targets = target_idx.shape
    return context.new_empty(n_blocks * batch, context_idx.shape[1] + n_targets, context.shape[2])


def _backward(
    grad: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    seed: int,
    step: int,
    step_tensor: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    shared: bool,
    n: int,
    need_pos: bool,
    need_sigma: bool,
    impl: str,
) -> _Tensors:
    dcontext, dmask_token, dpos, dsigma = backend(_OP, impl, grad).backward(
        grad.contiguous(),
        context_idx.contiguous(),
        target_idx.contiguous(),
        _key(seed, step, step_tensor, sample_ids, shared),
        n,
        need_pos,
        need_sigma,
    )
    none = grad.new_empty(0, dtype=torch.float32)
    return (
        dcontext,
        dmask_token,
        none if dpos is None else dpos,
        torch.empty_like(none) if dsigma is None else dsigma,
    )


def _backward_fake(
    grad: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    seed: int,
    step: int,
    step_tensor: torch.Tensor | None,
    sample_ids: torch.Tensor | None,
    shared: bool,
    n: int,
    need_pos: bool,
    need_sigma: bool,
    impl: str,
) -> _Tensors:
    width = grad.shape[2]
    return (
        grad.new_empty(*context_idx.shape, width),
        grad.new_empty(width, dtype=torch.float32),
        grad.new_empty((n, width) if need_pos else (0,), dtype=torch.float32),
        grad.new_empty(target_idx.shape[:2] if need_sigma else (0,), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, pos, mask_token, context_idx, target_idx, _ = inputs[:6]
    ctx.seed, ctx.step, step_tensor, sample_ids, ctx.shared, ctx.impl = inputs[6:]
    ctx.save_for_backward(context_idx, target_idx, step_tensor, sample_ids)
    ctx.n, ctx.pos_dtype, ctx.mask_token_dtype = pos.shape[0], pos.dtype, mask_token.dtype


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    context_idx, target_idx, step_tensor, sample_ids = ctx.saved_tensors
    need = ctx.needs_input_grad
    dcontext, dmask_token, dpos, dsigma = _backward_op(
        grad,
        context_idx,
        target_idx,
        ctx.seed,
        ctx.step,
        step_tensor,
        sample_ids,
        ctx.shared,
        ctx.n,
        need[1],
        need[5],
        ctx.impl,
    )
    return (
        dcontext,
        dpos.to(ctx.pos_dtype) if need[1] else None,
        dmask_token.to(ctx.mask_token_dtype),
        None,
        None,
        dsigma if need[5] else None,
        *[None] * 6,
    )


_backward_op = register(
    "predictor_tokens_backward(Tensor grad, Tensor context_idx, Tensor target_idx,"
    " SymInt seed, SymInt step, Tensor? step_tensor, Tensor? sample_ids, bool shared, SymInt n,"
    " bool need_pos, bool need_sigma, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "predictor_tokens(Tensor context, Tensor pos, Tensor mask_token, Tensor context_idx,"
    " Tensor target_idx, Tensor? sigma, SymInt seed, SymInt step, Tensor? step_tensor,"
    " Tensor? sample_ids, bool shared, str impl) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)


def predictor_tokens(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None = None,
    noise: NoiseKey | None = None,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """The predictor's input: context tokens with clean positions, then one query per target.

    B batch, M target blocks, Kc context tokens, Kt targets per block, N patches, d width:

        out[m*B + b, :Kc]     = context[b] + pos[context_idx[b]]             (the same for all m)
        out[m*B + b, Kc + t]  = mask_token + pos[j] + sigma[b, m] n,  j = target_idx[b, m, t]

    n ~ N(0, I) is counter-based (``njepa_kernels.philox_normal``): a function of seed, step, sample
    id, block, patch j and channel only, so neither the batch layout, nor the number of ranks, nor
    the implementation changes it. With ``noise.shared`` the block does not count: a patch has the
    same n in all blocks of an image. With ``sigma=None`` nothing is drawn; sigma = 0 gives the same
    output. Without noise these are the tokens of I-JEPA, in its row order (facebookresearch/ijepa,
    src/models/vision_transformer.py), with it those of N-JEPA (arXiv 2507.15216, algorithm 1;
    shared: its single level).

    Args:
        context: [B, Kc, d], fp32, bf16, fp16 or fp64.
        pos: [N, d] of any floating type.
        mask_token: [d], the same.
        context_idx: int64 [B, Kc] in [0, N).
        target_idx: int64 [B, M, Kt] in [0, N).
        sigma: fp32 (or fp64) [B, M], in units of ``pos``, or None.
        noise: what n is a function of; required with ``sigma``, without it not used.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        ``[M*B, Kc+Kt, d]``, row ``m*B + b``, in the type of ``context``. Noise and sums are fp32
        (sums fp64 if an input is fp64), rounded once at the end.

    Gradients: ``context`` (summed over M), ``mask_token``, ``pos``, ``sigma``, summed in fp32; the
    noise is drawn again, not stored. Deterministic, except the reference on an accelerator.

    The fused implementations take their inputs contiguous (others are copied) and ignore
    autocast, as the reference: the types are those of the arguments. No fp64, no second derivative.
    A captured CUDA graph keeps the seed of its capture, and the step, unless that is a tensor.

    Raises:
        TypeError, ValueError: wrong type, shape or device, ``sigma`` without ``noise``, or an index
            outside [0, N) (on an accelerator only under ``njepa_kernels.debug_checks()``, to spare
            a host sync).
    """
    op = _OP
    refuse_vmap(op, context, pos, mask_token, context_idx, target_idx, sigma)
    check_tensor(op, "context", context, "[B,Kc,d]")
    batch, n_context, width = context.shape
    device = context.device
    check_tensor(op, "pos", pos, "[N,d]", (None, width), device=device)
    check_tensor(op, "mask_token", mask_token, "[d]", (width,), device=device)
    check_tensor(
        op, "context_idx", context_idx, "[B,Kc]", (batch, n_context), dtypes=INDEX, device=device
    )
    check_tensor(
        op, "target_idx", target_idx, "[B,M,Kt]", (batch, None, None), dtypes=INDEX, device=device
    )
    if noise is not None:
        check_noise(op, noise, batch, device)
    if sigma is not None:
        wide = (torch.float32, torch.float64)
        shape = target_idx.shape[:2]
        check_tensor(op, "sigma", sigma, "[B,M]", shape, dtypes=wide, device=device)
        if noise is None:
            raise ValueError(
                f"{op}: sigma needs noise, a NoiseKey(seed, step, sample_ids); "
                "got sigma and noise=None"
            )
    check_index_range(op, "context_idx", context_idx, pos.shape[0])
    check_index_range(op, "target_idx", target_idx, pos.shape[0])
    name = choose(op, impl, device, context, pos, mask_token, sigma)
    if name == "reference":
        return predictor_tokens_reference(
            context, pos, mask_token, context_idx, target_idx, sigma, noise
        )
    key = words_of(noise if sigma is not None else None)
    out: torch.Tensor = _forward_op(
        context, pos, mask_token, context_idx, target_idx, sigma, *key, name
    )
    return out
