"""The published multi-block mask algorithm, image by image (docs/method.md, section 2).

In the way of the published collator: torch, one image and one block at a time, sizes from a
generator seeded with the step, places from the global one. Opponent of ``bench_masks.py`` and
oracle of the mask tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Range = tuple[float, float]


def block_size(r: float, scale: Range, aspect: Range, grid: tuple[int, int]) -> tuple[int, int]:
    """Block height and width from one uniform draw: it sets the area and the aspect ratio."""
    area = int(grid[0] * grid[1] * (scale[0] + r * (scale[1] - scale[0])))
    ratio = aspect[0] + r * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(height, grid[0] - 1), min(width, grid[1] - 1)


class PublishedCollator:
    """One batch a call; loops for ever where a block has no more than ``min_keep`` patches.

    Args:
        grid: rows and columns of patches. The other arguments are the published defaults.
    """

    def __init__(
        self, grid: tuple[int, int], blocks: int = 4, target_scale: Range = (0.15, 0.2),
        context_scale: Range = (0.85, 1.0), aspect: Range = (0.75, 1.5), min_keep: int = 10,
        allow_overlap: bool = False,
    ) -> None:  # fmt: skip
        self.grid, self.blocks, self.min_keep = grid, blocks, min_keep
        self.target_scale, self.context_scale, self.aspect = target_scale, context_scale, aspect
        self.allow_overlap = allow_overlap
        self.step = -1

    def __call__(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Context masks, a list of one [B, Kc], and target masks, a list of M [B, Kt]."""
        contexts, targets = self.draw(batch)
        shortest = min(len(kept) for kept in contexts)
        cut = torch.stack([kept[:shortest] for kept in contexts])
        return [cut], [torch.stack(column) for column in zip(*targets, strict=True)]

    def draw(self, batch: int) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Of each image: its context, before the batch is cut to one length, and its M blocks."""
        target, context = self._sizes()
        contexts, targets = [], []
        for _ in range(batch):
            placed = [self._place(target, []) for _ in range(self.blocks)]
            targets.append([kept for kept, _ in placed])
            outside = [] if self.allow_overlap else [free for _, free in placed]
            contexts.append(self._place(context, outside)[0])
        return contexts, targets

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        self.step += 1
        own = torch.Generator().manual_seed(self.step)
        target, context = (torch.rand(1, generator=own).item() for _ in range(2))
        return (
            block_size(target, self.target_scale, self.aspect, self.grid),
            block_size(context, self.context_scale, (1.0, 1.0), self.grid),
        )

    def _place(self, size: tuple[int, int], outside: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One block: its flat indices [k] and the map that is 0 inside it.

        ``outside``: maps to stay within; after 20 failures each, the last of them is given up.
        """
        height, width = size
        rows, columns = self.grid
        tries = 0
        while True:
            top = torch.randint(0, rows - height, (1,))
            left = torch.randint(0, columns - width, (1,))
            mask = torch.zeros(self.grid, dtype=torch.int32)
            mask[top : top + height, left : left + width] = 1
            for free in outside[: max(len(outside) - tries // 20, 0)]:
                mask *= free
            kept = torch.nonzero(mask.flatten()).squeeze(1)
            if len(kept) > self.min_keep:
                break
            tries += 1
        free = torch.ones(self.grid, dtype=torch.int32)
        free[top : top + height, left : left + width] = 0
        return kept, free
