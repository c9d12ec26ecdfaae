"""vicreg: invariance, variance and covariance of embeddings."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from ..._runtime.checks import can_read_values, check_tensor
from ..._runtime.dispatch import Impl, backend, choose
from ..._runtime.library import refuse_vmap, register
from ._gather import check_equal_shapes, gather_batch
from .reference import VicregTerms, vicreg_reference

_OP = "vicreg"
_Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _forward(u: torch.Tensor, gamma: float, eps: float, impl: str) -> _Tensors:
    outputs: _Tensors = backend(_OP, impl, u).forward(u.contiguous(), gamma, eps)
    return outputs


def _forward_fake(u: torch.Tensor, gamma: float, eps: float, impl: str) -> _Tensors:
    def empty(*shape: int) -> torch.Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    views, _, width = u.shape
    return empty(), empty(), empty(), empty(views, width), empty(views, width)


def _backward(
    u: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    g_inv: torch.Tensor,
    g_std: torch.Tensor,
    g_cov: torch.Tensor,
    gamma: float,
    eps: float,
    impl: str,
) -> torch.Tensor:
    fused = backend(_OP, impl, u)
    # Under autocast matrix products inside would run in bf16. Meta tensors know none.
    with nullcontext() if u.is_meta else torch.autocast(u.device.type, enabled=False):
        du: torch.Tensor = fused.backward(
            u.contiguous(), mean, std, g_inv, g_std, g_cov, gamma, eps
        )
    return du


def _backward_fake(u: torch.Tensor, *_: Any) -> torch.Tensor:
    return u.new_empty(u.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    u, ctx.gamma, ctx.eps, ctx.impl = inputs
    mean, std = output[3:]
    ctx.mark_non_differentiable(mean, std)
    ctx.save_for_backward(u, mean, std)


def _gradients(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    u, mean, std = ctx.saved_tensors
    return _backward_op(u, mean, std, *grads[:3], ctx.gamma, ctx.eps, ctx.impl), None, None, None


_backward_op = register(
    "vicreg_backward(Tensor u, Tensor mean, Tensor std, Tensor g_inv, Tensor g_std, Tensor g_cov,"
    " float gamma, float eps, str impl) -> Tensor",
    _backward,
    _backward_fake,
)
_forward_op = register(
    "vicreg(Tensor u, float gamma, float eps, str impl)"
    " -> (Tensor inv, Tensor std, Tensor cov, Tensor mean, Tensor root)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)


def vicreg(
    u: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    group: dist.ProcessGroup | None = None,
    *,
    impl: Impl = "auto",
) -> VicregTerms:
    """The three terms of VICReg (arXiv 2105.04906), averaged over all ordered pairs of views.

    M views, n samples, D width; C the unbiased covariance over the batch of one view:

        inv = 2/(M-1) sum_m mean |u_m - mean_m u|^2   (= mean over pairs of MSE(u_i, u_j))
        std = 1/M sum_m v(u_m),  v = mean_j relu(gamma - sqrt(C_jj + eps))
        cov = 2/M sum_m c(u_m),  c = sum_{i != j} C_ij^2 / D

    As in facebookresearch/vicreg, main_vicreg.py: per pair std is (v + v')/2 and cov is c + c'. The
    closed forms need no loop over pairs. One view stands for the pair (u, u): inv = 0, std = v,
    cov = 2c.

    Args:
        u: [n, D] (one view) or [M, n, D], fp32, bf16, fp16 or fp64.
        gamma: the standard deviation below which the hinge pushes, in units of ``u``.
        eps: added to the variance under the root, > 0.
        group: a ``torch.distributed`` process group: the batch is then that of all its ranks, which
            must all call with the same shape. None: this process alone.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        VicregTerms(inv, std, cov): unweighted scalars, computed and returned in fp32 (fp64 for fp64
        input), also under autocast; the same on every rank. Where the user allows TF32 matrix
        products (``torch.backends.cuda.matmul.fp32_precision``), ``cov`` uses them.

    Gradients: with a group the backward sums over the ranks, so that the *mean* over ranks of the
    parameter gradients (DDP, ZeRO) is the gradient of the one global loss. c is computed on the
    cheaper side: D x D, or n x n where n < D; the fused implementations hold that matrix in the
    backward only. ``u`` and two numbers per channel are saved. Deterministic. No second derivative,
    no fp64 but by the reference.

    Raises:
        TypeError, ValueError: wrong type, shape or number; fewer than two samples over all ranks;
            other shapes on other ranks (checked on CPU; on an accelerator only under
            ``njepa_kernels.debug_checks()``, to spare a collective and a host sync).
    """
    op = _OP
    refuse_vmap(op, u)
    three = isinstance(u, torch.Tensor) and u.dim() == 3
    check_tensor(op, "u", u, "[M,n,D]" if three else "[n,D]")
    n_ranks = 1 if group is None else dist.get_world_size(group)
    # Before any check that one rank alone could fail: the others would wait for it.
    if group is not None and n_ranks > 1 and can_read_values(u):
        check_equal_shapes(u, group)
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    if u.shape[-1] == 0 or (three and u.shape[0] == 0):
        raise ValueError(
            f"{op}: u must have at least one view and one channel, got {list(u.shape)}"
        )
    if u.shape[-2] * n_ranks < 2:
        raise ValueError(
            f"{op}: u must have at least 2 samples over all ranks (a variance needs two), "
            f"got {u.shape[-2]} on {n_ranks} rank(s)"
        )
    name = choose(op, impl, u.device, u)
    if name == "reference":
        return vicreg_reference(u, gamma, eps, group)
    views = gather_batch(u if three else u.unsqueeze(0), group)
    inv, std, cov, _, _ = _forward_op(views, float(gamma), float(eps), name)
    return VicregTerms(inv, std, cov)
