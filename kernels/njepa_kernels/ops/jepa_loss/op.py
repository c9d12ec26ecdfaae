"""jepa_loss: smooth-L1 between predictions and layer-normed target features."""

from __future__ import annotations

from typing import Any

import torch

from ..._runtime.checks import INDEX, check_index_range, check_like, check_tensor
from ..._runtime.dispatch import Impl, backend, choose
from ..._runtime.library import may_reuse_saved, refuse_vmap, register
from .reference import JepaLoss, Stop, jepa_loss_reference

_OP = "jepa_loss"


#: Of every fused forward: loss, terms [3], slopes of both predictions; empty where there is none.
_Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _scales(dtype: torch.dtype, count: int) -> tuple[float, float]:
    """What the forward and the backward each multiply s'(e) by; together 1 / count.

    All in the forward, so that a backward with gradient 1 has nothing left to do; but in fp16
    1 / count is no normal number, so there it waits for the gradient of the loss scaler.
    """
    scale = 1.0 / max(count, 1)
    return (1.0, scale) if dtype == torch.float16 else (scale, 1.0)


def _forward(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    noised: torch.Tensor | None,
    noise_weight: float,
    consistency: float,
    consistency_stop: str,
    beta: float,
    eps: float,
    need_pred: bool,
    need_noised: bool,
    impl: str,
) -> _Outputs:
    scale, _ = _scales(pred.dtype, pred.numel())
    pull = 0.0 if noised is None else 2.0 * consistency * scale
    outputs: _Outputs = backend(_OP, impl, pred).forward(
        pred.contiguous(),
        h.contiguous(),
        target_idx.contiguous(),
        None if noised is None else noised.contiguous(),
        noise_weight,
        consistency,
        beta,
        eps,
        scale,
        0.0 if consistency_stop == "clean" else pull,
        0.0 if consistency_stop == "noised" else pull,
        need_pred,
        need_noised,
    )
    return outputs


def _forward_fake(
    pred: torch.Tensor,
    h: torch.Tensor,
    target_idx: torch.Tensor,
    noised: torch.Tensor | None,
    noise_weight: float,
    consistency: float,
    consistency_stop: str,
    beta: float,
    eps: float,
    need_pred: bool,
    need_noised: bool,
    impl: str,
) -> _Outputs:
    loss = pred.new_empty((), dtype=torch.float32)
    terms = pred.new_empty(0 if noised is None else 3, dtype=torch.float32)
    dpred, dnoised = (
        pred.new_empty(pred.shape if need else (0,)) for need in (need_pred, need_noised)
    )
    return loss, terms, dpred, dnoised


def _backward(
    grad: torch.Tensor, dpred: torch.Tensor | None, dnoised: torch.Tensor | None, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    both = [
        grad.new_empty(0) if slope is None else torch.empty_like(slope)
        for slope in (dpred, dnoised)
    ]
    slopes = [(s, out) for s, out in zip((dpred, dnoised), both, strict=True) if s is not None]
    _scale([s for s, _ in slopes], [out for _, out in slopes], grad, impl)
    return both[0], both[1]


def _backward_fake(
    grad: torch.Tensor, dpred: torch.Tensor | None, dnoised: torch.Tensor | None, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (
        grad.new_empty(0) if slope is None else torch.empty_like(slope)
        for slope in (dpred, dnoised)
    )
    return first, second


def _scale(
    slopes: list[torch.Tensor], out: list[torch.Tensor], grad: torch.Tensor, impl: str
) -> None:
    _, scale = _scales(slopes[0].dtype, slopes[0].numel())
    backend(_OP, impl, slopes[0]).backward(grad, slopes, out, scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    need_pred, need_noised, ctx.impl = inputs[9:]
    _, terms, dpred, dnoised = output
    ctx.mark_non_differentiable(terms, dpred, dnoised)
    ctx.set_materialize_grads(False)  # else zeros as large as both slopes, which nobody reads
    ctx.save_for_backward(dpred if need_pred else None, dnoised if need_noised else None)


def _gradients(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad is None:  # the engine came here, but with no gradient
        return (None,) * 12
    dpred, dnoised = ctx.saved_tensors
    if may_reuse_saved():
        slopes = [slope for slope in (dpred, dnoised) if slope is not None]
        _scale(slopes, slopes, grad, ctx.impl)
    else:
        scaled = _backward_op(grad, dpred, dnoised, ctx.impl)
        dpred = None if dpred is None else scaled[0]
        dnoised = None if dnoised is None else scaled[1]
    return dpred, None, None, dnoised, *[None] * 8


_backward_op = register(
    "jepa_loss_backward(Tensor grad, Tensor? dpred, Tensor? dnoised, str impl) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "jepa_loss(Tensor pred, Tensor h, Tensor target_idx, Tensor? noised, float noise_weight,"
    " float consistency, str consistency_stop, float beta, float eps, bool need_pred,"
    " bool need_noised, str impl)"
    " -> (Tensor loss, Tensor terms, Tensor dpred, Tensor dnoised)",
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
        pred: ``[M*B, Kt, D]``, row ``m*B + b``, fp32, bf16, fp16 or fp64: the prediction from
            clean queries.
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

    The fused implementations compute the gradients in the forward, from the same read of every row,
    and keep those that are asked for: at their final scale (in fp16 short of the mean's 1 / count).
    The last backward of a graph returns these buffers, scaled in place, or as they are where the
    gradient of the loss is 1; under ``retain_graph=True``, ``create_graph=True`` and
    ``torch.compile`` it writes new ones. Inputs are taken contiguous (others are copied) and
    autocast is ignored, as in the reference: the types are those of the arguments. No fp64, no
    second derivative. Deterministic.

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
    if name == "reference":
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
    grad = torch.is_grad_enabled()
    loss, terms, _, _ = _forward_op(
        pred,
        h.detach(),
        target_idx,
        noised,
        float(noise_weight),
        float(consistency),
        consistency_stop,
        float(beta),
        float(eps),
        grad and pred.requires_grad,
        grad and noised is not None and noised.requires_grad,
        name,
    )
    if noised is None:
        return JepaLoss(loss, loss.detach(), None, None)
    return JepaLoss(loss, *terms.unbind())
