"""The native kernels as differentiable functions with the signatures of the public ops.

The tests of the kernels use these, so that they need neither dispatch nor registration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from njepa_kernels import AddLayerNorm, JepaLoss, NoiseKey, VicregTerms
from njepa_kernels.ops.adamw_ema_ import native as adamw_native
from njepa_kernels.ops.add_layer_norm import native as norm_native
from njepa_kernels.ops.bias_gelu import native as gelu_native
from njepa_kernels.ops.ema_update_ import native as ema_native
from njepa_kernels.ops.ema_update_.op import host_rates
from njepa_kernels.ops.gather_tokens import native as gather_native
from njepa_kernels.ops.jepa_loss import native as loss_native
from njepa_kernels.ops.patchify import native as patchify_native
from njepa_kernels.ops.predictor_tokens import native as predictor_native
from njepa_kernels.ops.vicreg import native as vicreg_native

Tensor = torch.Tensor


def patchify(
    images: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    idx: Tensor | None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return patchify_native.forward(images, patch_size, scale, shift, idx, out_dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, idx: Tensor, pos: Tensor | None) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.n, ctx.pos_dtype = x.shape[1], None if pos is None else pos.dtype
        return gather_native.forward(x, idx, pos)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[2]
        dx, dpos = gather_native.backward(grad.contiguous(), *ctx.saved_tensors, ctx.n, need)
        return dx, None, dpos.to(ctx.pos_dtype) if dpos is not None else None


def gather_tokens(x: Tensor, idx: Tensor, pos: Tensor | None = None) -> Tensor:
    out: Tensor = _Gather.apply(x, idx.flatten(1), pos)
    return out if idx.dim() == 2 else out.unflatten(1, idx.shape[1:])


class _Predictor(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: Tensor, pos: Tensor, mask: Tensor, sigma: Tensor | None, *rest: Any
    ) -> Tensor:
        context_idx, target_idx, noise = rest
        ctx.save_for_backward(context_idx, target_idx)
        ctx.rest = noise, pos.shape[0]
        ctx.dtypes = pos.dtype, mask.dtype
        return predictor_native.forward(context, pos, mask, context_idx, target_idx, sigma, noise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        dcontext, dmask, dpos, dsigma = predictor_native.backward(
            grad.contiguous(), *ctx.saved_tensors, *ctx.rest, need[1], need[3]
        )
        pos_dtype, mask_dtype = ctx.dtypes
        dpos = None if dpos is None else dpos.to(pos_dtype)
        return dcontext, dpos, dmask.to(mask_dtype), dsigma, *[None] * 3


def predictor_tokens(
    context: Tensor,
    pos: Tensor,
    mask_token: Tensor,
    context_idx: Tensor,
    target_idx: Tensor,
    sigma: Tensor | None = None,
    noise: NoiseKey | None = None,
) -> Tensor:
    out: Tensor = _Predictor.apply(context, pos, mask_token, sigma, context_idx, target_idx, noise)
    return out


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, noised: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        h, idx, noise_weight, consistency, stop, beta = rest
        scale = 1.0 / max(pred.numel(), 1)
        # In fp16 the mean's factor would underflow: it waits for the backward.
        ctx.later, scale = (scale, 1.0) if pred.dtype == torch.float16 else (1.0, scale)
        pull = 0.0 if noised is None else 2.0 * consistency * scale
        pulls = 0.0 if stop == "clean" else pull, 0.0 if stop == "noised" else pull
        weights = noise_weight, consistency, beta, 1e-5, scale
        need = noised is not None
        loss, terms, dpred, dnoised = loss_native.forward(
            pred, h, idx, noised, *weights, *pulls, True, need
        )
        ctx.save_for_backward(dpred, dnoised if need else None)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dpred, dnoised = ctx.saved_tensors
        slopes = [slope for slope in (dpred, dnoised) if slope is not None]
        loss_native.backward(grad, slopes, slopes, ctx.later)
        return dpred, dnoised, *[None] * 6


def jepa_loss(
    pred: Tensor,
    h: Tensor,
    target_idx: Tensor,
    noised: Tensor | None = None,
    *,
    noise_weight: float = 0.1,
    consistency: float = 0.1,
    consistency_stop: str = "none",
    beta: float = 1.0,
) -> JepaLoss:
    numbers = noise_weight, consistency, consistency_stop, beta
    loss, terms = _Loss.apply(pred, noised, h, target_idx, *numbers)
    return JepaLoss(loss, *((loss.detach(), None, None) if noised is None else terms.unbind()))


class _Vicreg(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, gamma: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        inv, std, cov, mean, deviation = vicreg_native.forward(u, gamma, eps)
        ctx.save_for_backward(u, mean, deviation)
        ctx.rest = gamma, eps
        return inv, std, cov

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return vicreg_native.backward(*ctx.saved_tensors, *grads, *ctx.rest), None, None


def vicreg(u: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> VicregTerms:
    return VicregTerms(*_Vicreg.apply(u if u.dim() == 3 else u.unsqueeze(0), gamma, eps))


def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    shadow: Sequence[Tensor] | None = None,
) -> None:
    rates = host_rates(momentum, torch.device("cpu"))
    ema_native.update(targets, sources, *rates, shadow)


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    **given: Any,
) -> None:
    lists = (given[name] or [] for name in ("targets", "params_bf16", "targets_bf16"))
    lr, weight_decay, momentum = (
        torch.as_tensor(given[name], dtype=torch.float64)
        for name in ("lr", "weight_decay", "momentum")
    )
    if params:
        adamw_native.update(
            params, grads, exp_avgs, exp_avg_sqs, steps, *lists, lr, given["betas"], given["eps"],
            weight_decay, momentum, given["scale"], given["found_inf"],
        )  # fmt: skip


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        given = x.flatten(0, 1), None if residual is None else residual.flatten(0, 1)
        out, total, stats = norm_native.forward(*given, weight, bias, *rest)
        ctx.save_for_backward(x if residual is None else total.view(x.shape), stats, weight)
        ctx.x_dtype, ctx.alone = x.dtype, residual is None
        if residual is None:
            ctx.mark_non_differentiable(total)
        return out.view(x.shape), total if residual is None else total.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        total, stats, weight = ctx.saved_tensors
        through = None if ctx.alone else grad_total.flatten(0, 1)
        dx, dresidual, sums = norm_native.backward(
            grad.flatten(0, 1), through, total.flatten(0, 1), stats, weight, ctx.x_dtype
        )
        dresidual = dx if total.dtype == ctx.x_dtype else dresidual
        dweight, dbias = (row.to(weight.dtype) for row in sums)
        both = dx.view(total.shape), None if ctx.alone else dresidual.view(total.shape)
        return *both, dweight, dbias, None, None


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype,
) -> AddLayerNorm:
    out, total = _AddLayerNorm.apply(x, residual, weight, bias, eps, out_dtype)
    return AddLayerNorm(out, x if residual is None else total)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.tanh = tanh
        return gelu_native.forward(x.flatten(0, 1), bias, tanh).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = gelu_native.backward(grad.flatten(0, 1), x.flatten(0, 1), bias, ctx.tanh)
        return dx.view(x.shape), dbias.to(bias.dtype), None


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    out: Tensor = _BiasGelu.apply(x, bias, approximate == "tanh")
    return out


NATIVE: dict[str, Callable[..., Any]] = {
    "patchify": patchify,
    "gather_tokens": gather_tokens,
    "predictor_tokens": predictor_tokens,
    "jepa_loss": jepa_loss,
    "vicreg": vicreg,
    "ema_update_": ema_update_,
    "add_layer_norm": add_layer_norm,
    "bias_gelu": bias_gelu,
    "adamw_ema_": adamw_ema_,
}
