"""bias_gelu: the bias of a linear layer and the GELU behind it, as one."""

from __future__ import annotations

from typing import Any

import torch

from ..._runtime.checks import check_rows, check_tensor
from ..._runtime.dispatch import Impl, backend, choose
from ..._runtime.library import refuse_vmap, register
from .reference import Approximate, bias_gelu_reference

_OP = "bias_gelu"


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _forward(x: torch.Tensor, bias: torch.Tensor, tanh: bool, impl: str) -> torch.Tensor:
    out: torch.Tensor = backend(_OP, impl, x).forward(_rows(x), bias.contiguous(), tanh)
    return out.view(x.shape)


def _forward_fake(x: torch.Tensor, bias: torch.Tensor, tanh: bool, impl: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, tanh: bool, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    fused = backend(_OP, impl, x)
    dx, dbias = fused.backward(_rows(grad), _rows(x), bias.contiguous(), tanh)
    return dx.view(x.shape), dbias


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, tanh: bool, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias, ctx.tanh, ctx.impl = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = _backward_op(grad, x, bias, ctx.tanh, ctx.impl)
    return dx, dbias.to(bias.dtype), None, None


_backward_op = register(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, bool tanh, str impl)"
    " -> (Tensor dx, Tensor dbias)",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "bias_gelu(Tensor x, Tensor bias, bool tanh, str impl) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)


def bias_gelu(
    x: torch.Tensor,
    bias: torch.Tensor,
    approximate: Approximate = "none",
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """GELU(x + bias), what stands between the two products of a transformer's MLP:

        u = x + bias
        none:  out = u Phi(u) = u (1 + erf(u / sqrt(2))) / 2
        tanh:  out = u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2

    (Hendrycks and Gimpel, arXiv 1606.08415; ``torch.nn.functional.gelu``, "none" as in timm's
    ``Mlp``.) ``x`` is the first product without its bias, in bf16 under autocast.

        hidden = bias_gelu(F.linear(x, fc1.weight), fc1.bias)

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64.
        bias: [D], of any of these types.
        approximate: "none" or "tanh".
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        [..., D] in the type of ``x``; u and everything behind it is fp32 (fp64 if an input is), and
        rounded once. The fused ones compute Phi within 2e-7, from one exponential; for "tanh" too.

    Gradients of x and of bias. The backward computes u and Phi(u) again from x, which is all that
    is kept beside the bias, and sums the bias's gradient in the same pass: over blocks of rows,
    then over the blocks, in a fixed order and without atomics. Deterministic; no host sync. Inputs
    are taken contiguous (others are copied), autocast is ignored. No fp64 and no second derivative
    in the fused implementations.

    A product can add the bias for free, so the forward moves what GELU alone would; it is the
    backward that saves a pass, the one over the gradient that sums it. Transformer Engine and
    flash-attention put bias and GELU into the products themselves, with CUDA libraries of their
    own; FLA has the tanh form, left to ``torch.compile``; Liger-Kernel the gated one. This package
    needs torch, and triton where it is.

    Raises:
        TypeError, ValueError: wrong type, shape, device or ``approximate``.
    """
    op = _OP
    refuse_vmap(op, x, bias)
    width = check_rows(op, "x", x)
    check_tensor(op, "bias", bias, "[D]", (width,), device=x.device)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate must be none or tanh, got {approximate!r}")
    name = choose(op, impl, x.device, x, bias)
    if name == "reference":
        return bias_gelu_reference(x, bias, approximate)
    out: torch.Tensor = _forward_op(x, bias, approximate == "tanh", name)
    return out
