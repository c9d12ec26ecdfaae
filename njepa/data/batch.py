"""The one contract between data and model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of each image of a batch, where they are not all the same (``mask.ragged``)."""

    counts: tuple[int, ...]
    """[B], on the host: nothing in the step reads them from the device."""
    tensor: Tensor
    """int64 [B], the same numbers on the device of the batch."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Lengths:
        return Lengths(self.counts, self.tensor.to(device, non_blocking=non_blocking))


class Batch(NamedTuple):
    """A micro-batch of one rank.

    B images of S x S pixels, Kc context patches, M target blocks of Kt patches.
    """

    images: Tensor
    """uint8 [B, S, S, 3], contiguous; the patch embedding normalises."""
    sample_ids: Tensor
    """int64 [B]: the planned ids. They key crop, mask, sigma and noise, also where an unreadable
    image was replaced by another one."""
    context_idx: Tensor
    """int64 [B, Kc]: row-major patch indices, ascending; with ``context_lengths`` padded by 0."""
    target_idx: Tensor
    """int64 [B, M, Kt]."""
    sigma: Tensor | None
    """float32 [B, M]: the standard deviation of each block's noise; None: no noise."""
    micro_step: int
    context_lengths: Lengths | None = None
    """Context patches of each image, Kc being the largest; None: Kc for all."""
    cut_frac: float = 0.0
    """Share of the context patches beyond those that the image with the fewest has, over the images
    that share Kc: cut off, or with ``mask.ragged`` kept."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device`` (asynchronously from pinned memory)."""
        return Batch(
            *(
                x.to(device, non_blocking=True) if isinstance(x, Tensor | Lengths) else x  # type: ignore[arg-type]
                for x in self
            )
        )
