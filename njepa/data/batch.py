"""The one contract between data and model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A micro-batch of one rank.

    B images of S x S pixels, Kc context patches, M target blocks of Kt patches, K noise levels.
    """

    images: Tensor
    """uint8 [B, S, S, 3], contiguous; the patch embedding normalises."""
    sample_ids: Tensor
    """int64 [B]: the planned ids. They key crop, mask, level and noise, also where an unreadable
    image was replaced by another one."""
    context_idx: Tensor
    """int64 [B, Kc]: row-major patch indices, ascending."""
    target_idx: Tensor
    """int64 [B, M, Kt]."""
    levels: Tensor | None
    """int64 [B, M], [B, M, Kt] or [B, K*M] (level-major): the noise level; None: no noise."""
    sigma: Tensor | None
    """float32, shape of ``levels``: the standard deviation of that level."""
    micro_step: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device`` (asynchronously from pinned memory)."""
        return Batch(
            *(
                x.to(device, non_blocking=True) if isinstance(x, Tensor) else x  # type: ignore[arg-type]
                for x in self
            )
        )
