"""The published multi-block mask algorithm, image by image: the oracle of the mask tests.

Written from the description in docs/method.md, section 2, in the way the published collator works
(torch, one image and one block at a time, global generator for places). It is also the opponent in
``bench/bench_masks.py``. It shares no code with ``njepa.draws.masks``.
"""

from __future__ import annotations

import math

import torch

from njepa.config import MaskConfig


def block_size(
    r: float, scale: tuple[float, float], aspect: tuple[float, float], grid: tuple[int, int]
) -> tuple[int, int]:
    """Block height and width from one uniform draw: it sets the area and the aspect ratio."""
    area = int(grid[0] * grid[1] * (scale[0] + r * (scale[1] - scale[0])))
    ratio = aspect[0] + r * (aspect[1] - aspect[0])
    h = round(math.sqrt(area * ratio))
    w = round(math.sqrt(area / ratio))
    while h >= grid[0]:
        h -= 1
    while w >= grid[1]:
        w -= 1
    return h, w


class OracleSampler:
    """One batch a call, as published; loops for ever where a target has no more than min_keep."""

    def __init__(self, config: MaskConfig, grid: tuple[int, int]) -> None:
        self.config, self.grid = config, grid
        self.counter = -1

    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        self.counter += 1
        generator = torch.Generator().manual_seed(self.counter)
        target = torch.rand(1, generator=generator).item()
        context = torch.rand(1, generator=generator).item()
        c = self.config
        return (
            block_size(target, c.target_scale, c.aspect_ratio, self.grid),
            block_size(context, c.context_scale, (1.0, 1.0), self.grid),
        )

    def place(
        self, size: tuple[int, int], allowed: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One block: its flat indices [k] and the map [H, W] that is 0 inside it."""
        (h, w), (rows, columns) = size, self.grid
        failures = 0
        while True:
            top = torch.randint(0, rows - h, (1,))
            left = torch.randint(0, columns - w, (1,))
            block = torch.zeros(rows, columns, dtype=torch.int32)
            block[top : top + h, left : left + w] = 1
            if allowed is not None:
                for region in allowed[: max(len(allowed) - failures // 20, 0)]:
                    block *= region
            indices = torch.nonzero(block.flatten())
            if len(indices) > self.config.min_keep:
                break
            failures += 1
        outside = torch.ones(rows, columns, dtype=torch.int32)
        outside[top : top + h, left : left + w] = 0
        return indices.squeeze(1), outside

    def __call__(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Context [B, K_c], targets [B, M, K_t], and each image's context length before cutting."""
        target_size, context_size = self.sizes()
        contexts, targets = [], []
        for _ in range(batch):
            placed = [self.place(target_size) for _ in range(self.config.n_targets)]
            allowed = None if self.config.allow_overlap else [outside for _, outside in placed]
            targets.append(torch.stack([indices for indices, _ in placed]))
            contexts.append(self.place(context_size, allowed)[0])
        lengths = [len(indices) for indices in contexts]
        shortest = min(lengths)
        context = torch.stack([indices[:shortest] for indices in contexts])
        return context, torch.stack(targets), lengths
