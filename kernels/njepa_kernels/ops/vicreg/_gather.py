"""The batch of all ranks, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _GatherBatch(torch.autograd.Function):
    """All ranks' [M, n, D], concatenated over the batch in rank order.

    Backward: the gradients that the ranks hold for the gathered batch are summed over the ranks and
    each rank keeps its own slice. If every rank computes the same global loss, its gradient comes
    out multiplied by the number of ranks, which the mean over ranks of DDP and ZeRO takes back.
    """

    @staticmethod
    def forward(ctx: Any, views: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        views = views.contiguous()
        parts = [torch.empty_like(views) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, views, group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # A clone: autograd may hand the same tensor to others.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        own = total.chunk(dist.get_world_size(ctx.group), dim=1)[dist.get_rank(ctx.group)]
        return own, None


def gather_batch(views: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[M, n, D] of every rank -> [M, R*n, D]; ``views`` itself without a group or with one rank."""
    if group is None or dist.get_world_size(group) == 1:
        return views
    gathered: torch.Tensor = _GatherBatch.apply(views, group)
    return gathered


def check_equal_shapes(views: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Raise, on every rank, unless all ranks hold the same shape (one small collective)."""
    # Padded to a fixed length, so that a rank with another number of dimensions takes part too.
    mine = torch.zeros(4, dtype=torch.int64, device=views.device)
    mine[0] = views.dim()
    for i, size in enumerate(views.shape[:3]):
        mine[i + 1] = size
    shapes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, mine, group=group)
    listed = [row.tolist() for row in shapes]
    if any(row != listed[0] for row in listed):
        sizes = "; ".join(f"rank {rank}: {row[1 : 1 + row[0]]}" for rank, row in enumerate(listed))
        raise ValueError(f"vicreg: u must have one shape on all ranks, got {sizes}")
