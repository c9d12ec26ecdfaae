"""add_layer_norm: the residual add and the LayerNorm of a pre-norm transformer block, as one."""

from __future__ import annotations

from typing import Any

import torch

from ..._runtime.checks import FLOATS, check_like, check_rows, check_tensor
from ..._runtime.dispatch import Impl, backend, choose
from ..._runtime.library import refuse_vmap, register
from .reference import AddLayerNorm, add_layer_norm_reference

_OP = "add_layer_norm"

#: Of every fused forward: out; the sum, empty without a residual; mean and 1 / std [2, rows].
_Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
    impl: str,
) -> _Outputs:
    out, total, stats = backend(_OP, impl, x).forward(
        _rows(x),
        None if residual is None else _rows(residual),
        weight.contiguous(),
        bias.contiguous(),
        eps,
        out_dtype,
    )
    return out.view(x.shape), total if residual is None else total.view(x.shape), stats


def _forward_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
    impl: str,
) -> _Outputs:
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=residual.dtype)
    stats = x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), total, stats


def _backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    x_dtype: torch.dtype,
    impl: str,
) -> _Outputs:
    dx, dresidual, sums = backend(_OP, impl, total).backward(
        _rows(grad),
        None if grad_total is None else _rows(grad_total),
        _rows(total),
        stats,
        weight.contiguous(),
        x_dtype,
    )
    shape = total.shape
    return dx.view(shape), dresidual.view(shape) if x_dtype != total.dtype else dresidual, sums


def _backward_fake(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    x_dtype: torch.dtype,
    impl: str,
) -> _Outputs:
    dx = total.new_empty(total.shape, dtype=x_dtype)
    dresidual = total.new_empty(0 if x_dtype == total.dtype else total.shape)
    return dx, dresidual, total.new_empty(2, total.shape[-1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    x, residual, weight, bias, _, _, ctx.impl = inputs
    _, total, stats = output
    if residual is None:
        ctx.mark_non_differentiable(total, stats)
        total = x
    else:
        ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.types = x.dtype, weight.dtype, bias.dtype
    ctx.save_for_backward(total, stats, weight)


def _gradients(
    ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None, _: Any
) -> tuple[torch.Tensor | None, ...]:
    total, stats, weight = ctx.saved_tensors
    x_dtype, weight_dtype, bias_dtype = ctx.types
    needs_residual = ctx.needs_input_grad[1]
    if grad is None:  # only the sum was used
        dx = None if grad_total is None else grad_total.to(x_dtype)
        return dx, grad_total if needs_residual else None, *[None] * 5
    dx, dresidual, sums = _backward_op(grad, grad_total, total, stats, weight, x_dtype, ctx.impl)
    if x_dtype == total.dtype:
        dresidual = dx  # of a sum: the same gradient, so one tensor where it has one type
    dweight, dbias = sums.unbind()
    return (
        dx,
        dresidual if needs_residual else None,
        dweight.to(weight_dtype),
        dbias.to(bias_dtype),
        *[None] * 3,
    )


_backward_op = register(
    "add_layer_norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor stats,"
    " Tensor weight, ScalarType x_dtype, str impl) -> (Tensor dx, Tensor dresidual, Tensor sums)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps,"
    " ScalarType out_dtype, str impl) -> (Tensor out, Tensor total, Tensor stats)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> AddLayerNorm:
    """The residual add of a pre-norm transformer block, and the LayerNorm of the sum:

        s = x + residual                                rounded to the type of residual
        out = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias     over the last dimension, D

    (Ba et al., arXiv 1607.06450; var divides by D.) Between attention and MLP of a block, ``x`` is
    what attention computed, in bf16 under autocast, and ``residual`` the stream that stays in a
    type of its own, fp32 or bf16. Without ``residual`` it is the LayerNorm alone, s = x, from the
    stream's type to that of the next product.

        out, stream = add_layer_norm(attention(out), stream, norm.weight, norm.bias, norm.eps)

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64.
        residual: shape of ``x``, of any of these types; or None.
        weight, bias: [D], of any of these types.
        eps: above 0; the default is timm's for Vision Transformers (``torch.nn.LayerNorm``: 1e-5).
        out_dtype: type of ``out``; None: that of ``x``.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        AddLayerNorm(out, residual): [..., D] each; ``residual`` is s, in its own type, and ``x``
        itself where there was none. Sums, statistics and the normalised row are fp32 (fp64 if an
        input is), and each result is rounded once.

    Gradients of x, residual (both that of s: through ``out``, plus what comes through s), weight
    and bias, in one pass over the rows; those of weight and bias are summed over blocks of rows and
    then over the blocks, in a fixed order and without atomics. Kept for it: s, and two numbers a
    row. Deterministic; no host sync. Inputs are taken contiguous (others are copied), autocast is
    ignored. No fp64 and no second derivative in the fused implementations; triton holds a row in
    registers and gets slow above D = 8192.

    Others fuse parts of it for CUDA: Liger-Kernel has LayerNorm without the residual, in the type
    of its input, and residual + RMSNorm; FLA (after flash-attention and mamba) the same formula as
    here, its tiles found by timing and as many partial sums as the GPU has multiprocessors; QuACK
    RMSNorm with residual, and LayerNorm forward only, in CuTe DSL for H100 and B200; Transformer
    Engine LayerNorm with the following product, as modules on its CUDA library. None is made for a
    CPU, and each brings dependencies; this package stays on torch, and on triton where it is.

    Raises:
        TypeError, ValueError: wrong type, shape, device or number.
    """
    op = _OP
    refuse_vmap(op, x, residual, weight, bias)
    width = check_rows(op, "x", x)
    if residual is not None:
        check_like(op, "residual", residual, FLOATS, x)
    check_tensor(op, "weight", weight, "[D]", (width,), device=x.device)
    check_tensor(op, "bias", bias, "[D]", (width,), device=x.device)
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    if out_dtype is None:
        out_dtype = x.dtype
    elif out_dtype not in FLOATS:
        expected = " or ".join(str(dtype) for dtype in FLOATS)
        raise TypeError(f"{op}: out_dtype must be None or {expected}, got {out_dtype}")
    name = choose(op, impl, x.device, x, residual, weight, bias, dtype=out_dtype)
    if name == "reference":
        return add_layer_norm_reference(x, residual, weight, bias, eps, out_dtype=out_dtype)
    out, total, _ = _forward_op(x, residual, weight, bias, float(eps), out_dtype, name)
    return AddLayerNorm(out, x if residual is None else total)
