"""jepa_loss: smooth-L1 between predictions and layer-normed target features."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import INDEX, check_index_range, check_per_block, check_tensor
from .._dispatch import Impl, backend, choose
from .._library import refuse_vmap, register
from .reference import JepaLoss, jepa_loss_reference

_OP = "jepa_loss"


def _forward(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    weight: torch.Tensor | None,
    beta: float,
    eps: float,
    need_grad: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, per_token, slope = backend(_OP, impl, pred).forward(
        pred.contiguous(),
        h.contiguous(),
        target_idx.contiguous(),
        None if weight is None else weight.contiguous(),
        beta,
        eps,
        need_grad,
    )
    return loss, per_token, pred.new_empty(0) if slope is None else slope


def _forward_fake(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    weight: torch.Tensor | None,
    beta: float,
    eps: float,
    need_grad: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = pred.new_empty((), dtype=torch.float32)
    slope = pred.new_empty(pred.shape if need_grad else (0,))
    return loss, pred.new_empty(target_idx.shape, dtype=torch.float32), slope


def _backward(grad: torch.Tensor, slope: torch.Tensor, impl: str) -> torch.Tensor:
    dpred: torch.Tensor = backend(_OP, impl, slope).backward(grad, slope)
    return dpred


def _backward_fake(grad: torch.Tensor, slope: torch.Tensor, impl: str) -> torch.Tensor:
    return torch.empty_like(slope)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, per_token, slope = output
    ctx.mark_non_differentiable(per_token, slope)
    ctx.has_weight, ctx.impl = inputs[3] is not None, inputs[7]
    ctx.save_for_backward(slope, per_token if ctx.has_weight else None)


def _gradients(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    slope, per_token = ctx.saved_tensors
    dpred = _backward_op(grad, slope, ctx.impl) if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[3]:
        dweight = per_token * (grad / per_token.numel())
    return dpred, None, None, dweight, None, None, None, None


_backward_op = register(
    "jepa_loss_backward(Tensor grad, Tensor slope, str impl) -> Tensor",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "jepa_loss(Tensor pred, Tensor h, Tensor target_idx, Tensor? weight, float beta, float eps,"
    " bool need_grad, str impl) -> (Tensor loss, Tensor per_token, Tensor slope)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)


def jepa_loss(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    weight: torch.Tensor | None = None,
    beta: float = 1.0,
    eps: float = 1e-5,
    *,
    impl: Impl = "auto",
) -> JepaLoss:
    """The prediction loss of I-JEPA, also per token (from which a loss per noise level follows).

    B batch, M target blocks, Kt targets per block, N patches, D width:

        y[b, m, t] = LayerNorm(h[b, target_idx[b, m, t]])        no affine; only these rows
        e = pred[m*B + b, t] - y[b, m, t]
        s(e) = e^2 / (2 beta) where |e| < beta, else |e| - beta/2         (beta = 0: |e|)
        loss = mean over b, m, t, D of weight * s(e);   per_token = mean over D of s(e)

    Without ``weight`` the reference is, bit for bit in fp32, what the published code computes
    (facebookresearch/ijepa, src/train.py: layer_norm of all tokens, gather, smooth_l1_loss).

    Args:
        pred: [M*B, Kt, D], row m*B + b, fp32, bf16, fp16 or fp64.
        h: [B, N, D] of any floating type: the target encoder's features. A constant: it gets no
            gradient, even if it requires one.
        target_idx: int64 [B, M, Kt] in [0, N).
        weight: floating [B, M] or [B, M, Kt], or None for 1. It may require a gradient.
        beta: where the square meets the line, in units of the normalised features, >= 0.
        eps: of the LayerNorm, > 0.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        JepaLoss(loss, per_token): a scalar and [B, M, Kt], both fp32 (fp64 if an input is fp64), as
        are all sums inside. per_token is detached and unweighted. An empty batch gives nan.

    The fused implementations write the slope weight * s'(e) of ``pred`` (in its type) in the
    forward; the backward multiplies it by grad / (B M Kt D) in fp32. They take their inputs
    contiguous (others are copied) and pay no heed to autocast, as the reference: the types are
    those of the arguments. No fp64, no second derivative. Deterministic.

    Raises:
        TypeError, ValueError: wrong type, shape, device or number, or an index outside [0, N) (on
            an accelerator only under ``njepa_kernels.debug_checks()``, to spare a host sync).
    """
    op = _OP
    refuse_vmap(op, pred, h, target_idx, weight)
    check_tensor(op, "h", h, "[B,N,D]")
    batch, n, width = h.shape
    device = h.device
    check_tensor(
        op, "target_idx", target_idx, "[B,M,Kt]", (batch, None, None), dtypes=INDEX, device=device
    )
    _, n_blocks, n_targets = target_idx.shape
    check_tensor(
        op, "pred", pred, "[M*B,Kt,D]", (n_blocks * batch, n_targets, width), device=device
    )
    if weight is not None:
        check_per_block(op, "weight", weight, target_idx)
    if not beta >= 0:
        raise ValueError(f"{op}: beta must be at least 0, got {beta}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    check_index_range(op, "target_idx", target_idx, n)
    name = choose(op, impl, device, pred, h, weight)
    if name == "reference":
        return jepa_loss_reference(pred, h, target_idx, weight, beta, eps)
    if weight is not None:
        per_block = weight.dim() == 2
        weight = (weight.unsqueeze(-1).expand(target_idx.shape) if per_block else weight).float()
    need_grad = pred.requires_grad and torch.is_grad_enabled()
    loss, per_token, _ = _forward_op(
        pred, h.detach(), target_idx, weight, float(beta), float(eps), need_grad, name
    )
    return JepaLoss(loss, per_token)
