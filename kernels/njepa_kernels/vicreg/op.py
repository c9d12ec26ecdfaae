"""vicreg: invariance, variance and covariance of embeddings."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .._checks import can_read_values, check_tensor
from .._dispatch import Impl, choose
from ._gather import check_equal_shapes
from .reference import VicregTerms, vicreg_reference


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
        products, ``cov`` uses them.

    Gradients: with a group the backward sums over the ranks, so that the *mean* over ranks of the
    parameter gradients (DDP, ZeRO) is the gradient of the one global loss. c is computed on the
    cheaper side: D x D, or n x n where n < D.

    Raises:
        TypeError, ValueError: wrong type, shape or number; fewer than two samples over all ranks;
            other shapes on other ranks (checked on CPU; on an accelerator only under
            ``njepa_kernels.debug_checks()``, to spare a collective and a host sync).
    """
    op = "vicreg"
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
    choose(op, impl, u.device)
    return vicreg_reference(u, gamma, eps, group)
