"""jepa_loss: smooth-L1 between predictions and layer-normed target features."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import INDEX, check_index_range, check_like, check_tensor
from .._dispatch import Impl, backend, choose
from .._library import refuse_vmap, register
from .reference import JepaLoss, Stop, jepa_loss_reference

_OP = "jepa_loss"


def _forward(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    beta: float,
    eps: float,
    need_grad: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    loss, _, slope = backend(_OP, impl, pred).forward(
        pred.contiguous(), h.contiguous(), target_idx.contiguous(), None, beta, eps, need_grad
    )
    return loss, pred.new_empty(0) if slope is None else slope


def _forward_fake(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    beta: float,
    eps: float,
    need_grad: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = pred.new_empty((), dtype=torch.float32)
    return loss, pred.new_empty(pred.shape if need_grad else (0,))


def _backward(grad: torch.Tensor, slope: torch.Tensor, impl: str) -> torch.Tensor:
    dpred: torch.Tensor = backend(_OP, impl, slope).backward(grad, slope)
    return dpred


def _backward_fake(grad: torch.Tensor, slope: torch.Tensor, impl: str) -> torch.Tensor:
    return torch.empty_like(slope)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.impl = inputs[6]
    ctx.save_for_backward(output[1])


def _gradients(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    (slope,) = ctx.saved_tensors
    dpred = _backward_op(grad, slope, ctx.impl) if ctx.needs_input_grad[0] else None
    return dpred, *[None] * 6


_backward_op = register(
    "jepa_loss_backward(Tensor grad, Tensor slope, str impl) -> Tensor",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "jepa_loss(Tensor pred, Tensor h, Tensor target_idx, float beta, float eps,"
    " bool need_grad, str impl) -> (Tensor loss, Tensor slope)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)


def jepa_loss(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    noised: torch.Tensor | None = None,
    *,
    noise_weight: float = 0.1,
    consistency: float = 0.1,
    consistency_stop: Stop = "none",
    beta: float = 1.0,
    eps: float = 1e-5,
    impl: Impl = "auto",
) -> JepaLoss:
    """The prediction loss of I-JEPA; with a second prediction that of N-JEPA.

    B batch, M target blocks, Kt targets per block, N patches, D width:

        y[b, m, t] = LayerNorm(h[b, target_idx[b, m, t]])        no affine; only these rows
        s(e) = e^2 / (2 beta) where |e| < beta, else |e| - beta/2         (beta = 0: |e|)
        clean  = mean over b, m, t, D of s(pred[m*B + b, t] - y[b, m, t])
        noised = mean of s(noised - y);   consistency = mean of (noised - pred)^2
        loss   = clean + noise_weight * noised + consistency_weight * consistency

    where consistency_weight is the argument ``consistency``. Without ``noised`` the loss is
    ``clean``, and the reference is, bit for bit in fp32, what the published code computes
    (facebookresearch/ijepa, src/train.py: layer_norm of all tokens, gather, smooth_l1_loss).

    Args:
        pred: [M*B, Kt, D], row m*B + b, fp32, bf16, fp16 or fp64: the prediction from clean
            queries.
        h: [B, N, D] of any floating type: the target encoder's features. A constant: it gets no
            gradient, even if it requires one.
        target_idx: int64 [B, M, Kt] in [0, N).
        noised: shape and type of ``pred``: the prediction from noised queries; or None.
        noise_weight, consistency: weights of the other two terms, >= 0 (lambda1 and lambda2 of
            N-JEPA). Without effect if ``noised`` is None.
        consistency_stop: "clean": ``pred`` counts as a constant in the consistency term, whose
            gradient then reaches ``noised`` alone; "noised": the reverse; "none": it reaches both.
        beta: where the square meets the line, in units of the normalised features, >= 0.
        eps: of the LayerNorm, > 0.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        JepaLoss(loss, clean, noised, consistency): scalars, fp32 (fp64 if an input is fp64), as are
        all sums inside. The terms are detached and unweighted; the last two are None without
        ``noised``. An empty batch gives nan.

    Raises:
        TypeError, ValueError: wrong type, shape, device or number, or an index outside [0, N) (on
            an accelerator only under ``njepa_kernels.debug_checks()``, to spare a host sync).
    """
    op = _OP
    refuse_vmap(op, pred, h, target_idx, noised)
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
    if noised is not None:
        check_like(op, "noised", noised, (pred.dtype,), pred)
    weights = {"noise_weight": noise_weight, "consistency": consistency, "beta": beta}
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {value}")
    if consistency_stop not in ("none", "clean", "noised"):
        raise ValueError(
            f"{op}: consistency_stop must be none, clean or noised, got {consistency_stop!r}"
        )
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    check_index_range(op, "target_idx", target_idx, n)
    name = choose(op, impl, device, pred, h, noised)
    if name == "reference" or noised is not None:
        return jepa_loss_reference(
            pred,
            h,
            target_idx,
            noised,
            noise_weight=noise_weight,
            consistency=consistency,
            consistency_stop=consistency_stop,
            beta=beta,
            eps=eps,
        )
    need_grad = pred.requires_grad and torch.is_grad_enabled()
    loss, _ = _forward_op(pred, h.detach(), target_idx, float(beta), float(eps), need_grad, name)
    return JepaLoss(loss, loss.detach(), None, None)
