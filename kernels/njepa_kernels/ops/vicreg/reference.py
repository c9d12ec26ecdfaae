"""The specification of vicreg in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from ..._runtime.rows import compute_dtype
from ._gather import gather_batch


class VicregTerms(NamedTuple):
    """The unweighted terms: three fp32 scalars (fp64 for fp64 input)."""

    inv: torch.Tensor
    std: torch.Tensor
    cov: torch.Tensor


def _covariance_term(centred: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """sum over views of c(u_m) = sum_{i != j} C_ij^2 / D, from the cheaper of the two products."""
    _, n, width = centred.shape
    if width <= n:
        covariance = centred.transpose(1, 2) @ centred / (n - 1)
        # Dropping the diagonal before squaring avoids the cancellation of sum C^2 - sum C_ii^2.
        diagonal = torch.eye(width, dtype=torch.bool, device=centred.device)
        total = covariance.masked_fill(diagonal, 0.0).square().sum()
    else:
        # sum_ij C_ij^2 = ||U U^T||_F^2 / (n-1)^2. Rank < n < D keeps the off-diagonal part large,
        # so the subtraction is harmless here.
        gram = centred @ centred.transpose(1, 2) / (n - 1)
        total = gram.square().sum() - variance.square().sum()
    return total / width


def vicreg_reference(
    u: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    group: dist.ProcessGroup | None = None,
) -> VicregTerms:
    """inv, std, cov in closed form over the global batch, in fp32."""
    views = u if u.dim() == 3 else u.unsqueeze(0)
    # Under autocast the products below would run in bf16.
    with torch.autocast(u.device.type, enabled=False):
        views = gather_batch(views.to(compute_dtype(u)), group)
        n_views, n, _ = views.shape
        # Zero for one view: there the mean view is the view itself.
        spread = (views - views.mean(dim=0)).square().mean(dim=(1, 2)).sum()
        inv = spread * (2.0 / max(n_views - 1, 1))
        centred = views - views.mean(dim=1, keepdim=True)
        variance = centred.square().sum(dim=1) / (n - 1)
        std = (gamma - (variance + eps).sqrt()).relu().mean()
        cov = _covariance_term(centred, variance) * (2.0 / n_views)
    return VicregTerms(inv, std, cov)
