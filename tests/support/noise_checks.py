"""What the noise must satisfy, whoever draws it: ``philox_normal`` or a backend of the op."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import torch
from njepa_kernels import NoiseKey

#: (key, patches [B, M, Kt], dim) -> standard normals [B, M, Kt, dim]
Draw = Callable[[NoiseKey, torch.Tensor, int], torch.Tensor]

BLOCKS = 4


def noise_of(predictor_tokens: Callable[..., torch.Tensor]) -> Draw:
    """The noise that an implementation adds: no position, no mask token, sigma = 1."""

    def draw(noise: NoiseKey, patches: torch.Tensor, dim: int) -> torch.Tensor:
        batch, n_blocks, n_targets = patches.shape
        device = patches.device
        out = predictor_tokens(
            torch.zeros(batch, 0, dim, device=device),
            torch.zeros(int(patches.max()) + 1, dim, device=device),
            torch.zeros(dim, device=device),
            patches.new_zeros(batch, 0),
            patches,
            torch.ones(batch, n_blocks, device=device),
            noise,
        )
        return out.view(n_blocks, batch, n_targets, dim).transpose(0, 1)

    return draw


def check_draws(
    draw: Draw, *, device: str = "cpu", samples: int = 12, targets: int = 24, dim: int = 100
) -> None:
    """Per block: standard, independent between blocks. Shared: block 0 of that in every block."""
    ids = (torch.arange(samples) * 7 + 2**31 - 3).to(device)
    patches = torch.arange(targets, device=device).expand(samples, BLOCKS, -1).contiguous()
    per_block = draw(NoiseKey(5, 9, ids), patches, dim)
    shared = draw(NoiseKey(5, 9, ids, shared=True), patches, dim)

    for m in range(BLOCKS):
        assert torch.equal(shared[:, m], per_block[:, 0]), f"block {m} is not block 0"
    # The patch counts, not its place: blocks that hold it elsewhere have its noise elsewhere.
    moved = patches.clone()
    for m in range(BLOCKS):
        moved[:, m] = patches[:, m].roll(m, dims=1)
    elsewhere = draw(NoiseKey(5, 9, ids, shared=True), moved, dim)
    for m in range(BLOCKS):
        assert torch.equal(elsewhere[:, m], shared[:, m].roll(m, dims=1)), f"block {m}"

    # Five standard errors of n independent standard normals: 1/sqrt(n) for the mean and for the
    # mean of products of two of them, 1/sqrt(2n) for the standard deviation.
    blocks = per_block.double().cpu().unbind(1)
    n = blocks[0].numel()
    for m, block in enumerate(blocks):
        assert abs(float(block.mean())) < 5 / math.sqrt(n), f"mean of block {m}"
        assert abs(float(block.std()) - 1) < 5 / math.sqrt(2 * n), f"deviation of block {m}"
    for a, b in combinations(range(BLOCKS), 2):
        assert not bool((blocks[a] == blocks[b]).any()), f"blocks {a} and {b} share draws"
        product = float((blocks[a] * blocks[b]).mean())
        assert abs(product) < 5 / math.sqrt(n), f"correlation of blocks {a} and {b}"
    # Shared between the blocks of an image, not between images or patches.
    alone = shared[:, 0].double().cpu()
    for axis in (0, 1):
        size = alone.shape[axis] - 1
        product = alone.narrow(axis, 0, size) * alone.narrow(axis, 1, size)
        assert abs(float(product.mean())) < 5 / math.sqrt(product.numel()), f"axis {axis}"
