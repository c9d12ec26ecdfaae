"""The published mask sampler, called as the tests of ours call it."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.published.masks import PublishedCollator, block_size
from njepa.config import MaskConfig

__all__ = ["OracleSampler", "block_size"]


class OracleSampler:
    """One batch a call: context [B, Kc], targets [B, M, Kt], lengths of contexts before the cut."""

    def __init__(self, config: MaskConfig, grid: tuple[int, int]) -> None:
        self.collator = PublishedCollator(
            grid, config.n_targets, config.target_scale, config.context_scale,
            config.aspect_ratio, config.min_keep, config.allow_overlap,
        )  # fmt: skip

    def __call__(self, batch: int) -> tuple[Tensor, Tensor, list[int]]:
        contexts, targets = self.collator.draw(batch)
        lengths = [len(kept) for kept in contexts]
        context = torch.stack([kept[: min(lengths)] for kept in contexts])
        return context, torch.stack([torch.stack(blocks) for blocks in targets]), lengths
