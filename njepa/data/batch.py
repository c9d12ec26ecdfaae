"""The one contract between data and model. B images, Kc context patches, M target blocks of Kt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from njepa_kernels import NoiseKey
from torch import Tensor

from njepa.draws.masks import DrawnMasks


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of each image of a batch, where they are not all the same (``mask.ragged``)."""

    counts: tuple[int, ...]
    """[B], on the host: nothing in the step reads them from the device."""
    tensor: Tensor
    """int64 [B], the same numbers on the device of the batch."""

    def to(self, device: torch.device | str) -> Lengths:
        return Lengths(self.counts, self.tensor.to(device, non_blocking=True))


class Masks(NamedTuple):
    """Which patches are context and which are targets, by row-major index."""

    context_idx: Tensor
    """int64 [B, Kc], ascending; with ``context_lengths`` padded by 0."""
    target_idx: Tensor
    """int64 [B, M, Kt]."""
    context_lengths: Lengths | None = None
    """Context patches of each image, Kc being the largest; None: Kc for all."""

    def to(self, device: torch.device | str) -> Masks:
        lengths = self.context_lengths
        return Masks(
            self.context_idx.to(device, non_blocking=True),
            self.target_idx.to(device, non_blocking=True),
            None if lengths is None else lengths.to(device),
        )


def as_masks(drawn: DrawnMasks, ragged: bool, pinned: bool = False) -> Masks:
    """Drawn masks as tensors; ``ragged``: contexts of different lengths, cut to the longest."""
    context_idx, target_idx, lengths = drawn
    context_lengths = None
    if ragged:
        context_idx = context_idx[:, : lengths.max()]
        if lengths.min() < lengths.max():
            context_lengths = Lengths(tuple(lengths.tolist()), as_tensor(lengths, pinned))
    context, target = (as_tensor(idx, pinned) for idx in (context_idx, target_idx))
    return Masks(context, target, context_lengths)


def as_tensor(array: npt.NDArray[np.generic], pinned: bool) -> Tensor:
    """A copy; ``pinned``: in memory that a GPU can copy from by itself."""
    tensor = torch.from_numpy(array.copy())
    return tensor.pin_memory() if pinned else tensor


class Noise(NamedTuple):
    """The noise of the queries: how strong, and what it is a function of."""

    sigma: Tensor
    """float32 [B, M]: the standard deviation in each block."""
    key: NoiseKey
    """Seed, micro-step and sample ids."""

    def to(self, device: torch.device | str) -> Noise:
        ids = self.key.sample_ids.to(device, non_blocking=True)
        sigma = self.sigma.to(device, non_blocking=True)
        return Noise(sigma, self.key._replace(sample_ids=ids))


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    images: Tensor
    """uint8 [B, S, S, 3], contiguous; the patch embedding normalises."""
    masks: Masks
    noise: Noise | None
    """None: no prediction is noised."""
    sample_ids: Tensor
    """int64 [B], on the host: the planned ids. They key crop, mask, sigma and noise, also where an
    unreadable image was replaced by another one."""
    micro_step: int
    cut_frac: float = 0.0
    """Share of the context patches beyond those that the image with the fewest has, over the images
    that share Kc: cut off, or with ``mask.ragged`` kept."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device`` (asynchronously from pinned memory)."""
        return self._replace(
            images=self.images.to(device, non_blocking=True),
            masks=self.masks.to(device),
            noise=None if self.noise is None else self.noise.to(device),
        )
