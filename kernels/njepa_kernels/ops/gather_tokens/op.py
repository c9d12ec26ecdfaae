"""gather_tokens: the kept tokens, with their position embedding."""

from __future__ import annotations

from typing import Any

import torch

from ..._runtime.checks import INDEX, check_index_range, check_tensor
from ..._runtime.dispatch import Impl, backend, choose
from ..._runtime.library import refuse_vmap, register
from .reference import gather_tokens_reference

_OP = "gather_tokens"


def _forward(
    x: torch.Tensor, idx: torch.Tensor, pos: torch.Tensor | None, impl: str
) -> torch.Tensor:
    fused = backend(_OP, impl, x)
    table = None if pos is None else pos.contiguous()
    out: torch.Tensor = fused.forward(x.contiguous(), idx.contiguous(), table)
    return out


def _forward_fake(
    x: torch.Tensor, idx: torch.Tensor, pos: torch.Tensor | None, impl: str
) -> torch.Tensor:
    return x.new_empty(*idx.shape, x.shape[2])


def _backward(
    grad: torch.Tensor, idx: torch.Tensor, n: int, need_pos: bool, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    fused = backend(_OP, impl, grad)
    dx, dpos = fused.backward(grad.contiguous(), idx.contiguous(), n, need_pos)
    return dx, grad.new_empty(0, dtype=torch.float32) if dpos is None else dpos


def _backward_fake(
    grad: torch.Tensor, idx: torch.Tensor, n: int, need_pos: bool, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    width = grad.shape[2]
    dpos = grad.new_empty((n, width) if need_pos else (0,), dtype=torch.float32)
    return grad.new_empty(grad.shape[0], n, width), dpos


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, idx, pos, ctx.impl = inputs
    ctx.save_for_backward(idx)
    ctx.n = x.shape[1]
    ctx.pos_dtype = None if pos is None else pos.dtype


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (idx,) = ctx.saved_tensors
    need_pos = ctx.needs_input_grad[2]
    dx, dpos = _backward_op(grad, idx, ctx.n, need_pos, ctx.impl)
    return dx, None, dpos.to(ctx.pos_dtype) if need_pos else None, None


_backward_op = register(
    "gather_tokens_backward(Tensor grad, Tensor idx, SymInt n, bool need_pos, str impl)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "gather_tokens(Tensor x, Tensor idx, Tensor? pos, str impl) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)


def gather_tokens(
    x: torch.Tensor,
    idx: torch.Tensor,
    pos: torch.Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Tokens of each sample by index, plus their position embedding: x[b, idx] + pos[idx].

    B batch, N patches, K kept tokens, M masks, D width. The masking step of the I-JEPA encoder
    (facebookresearch/ijepa, src/masks/utils.py ``apply_masks``), batch-major.

    Args:
        x: [B, N, D], fp32, bf16, fp16 or fp64.
        idx: int64 [B, K] or [B, M, K], in [0, N); duplicates allowed.
        pos: [N, D] of any floating type, or None.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        [B, K, D] or [B, M, K, D] in the type of ``x``. With ``pos`` the sum is taken in fp32 (fp64
        for fp64 inputs) and rounded once.

    Gradients: ``x`` (duplicates are summed; in fp32 by the fused implementations, in the type of
    ``x`` by the reference) and ``pos`` (fp32 sums); only ``idx`` is saved. Deterministic, except
    the reference on an accelerator.

    The fused implementations take their inputs contiguous (others are copied) and ignore
    autocast, as the reference: the types are those of the arguments. No fp64, no second derivative.

    Raises:
        TypeError, ValueError: wrong type, shape, device, or an index outside [0, N) (on an
            accelerator only under ``njepa_kernels.debug_checks()``, to spare a host sync).
    """
    op = _OP
    refuse_vmap(op, x, idx, pos)
    check_tensor(op, "x", x, "[B,N,D]")
    batch, n, width = x.shape
    three = isinstance(idx, torch.Tensor) and idx.dim() == 3
    layout = "[B,M,K]" if three else "[B,K]"
    shape = (batch, None, None) if three else (batch, None)
    check_tensor(op, "idx", idx, layout, shape, dtypes=INDEX, device=x.device)
    if pos is not None:
        check_tensor(op, "pos", pos, "[N,D]", (n, width), device=x.device)
    check_index_range(op, "idx", idx, n)
    name = choose(op, impl, x.device, x, pos)
    if name == "reference":
        return gather_tokens_reference(x, idx, pos)
    out: torch.Tensor = _forward_op(x, idx.flatten(1), pos, name)
    return out.unflatten(1, idx.shape[1:]) if three else out
