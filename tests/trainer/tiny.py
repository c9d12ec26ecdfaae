"""A tiny configuration and random batches for the tests of models, objectives and step."""

from __future__ import annotations

from typing import Any

import torch

from njepa.config import Config, parse_config
from njepa.data.batch import Batch

SIDE, N_BLOCKS, N_CONTEXT, N_TARGETS = 6, 4, 10, 5
SIGMAS = (2.0, 0.716, 0.215, 0.05)


def tiny_config(method: str = "ijepa", **sections: dict[str, Any]) -> Config:
    raw: dict[str, Any] = {
        "method": method,
        "data": {"image_size": 8 * SIDE},
        "mask": {"min_keep": 2, "n_targets": N_BLOCKS},
        "model": {
            "encoder": "vit_tiny", "patch_size": 8, "width": 32, "depth": 2, "heads": 2,
            "predictor": {"width": 24, "depth": 2, "heads": 2},
        },
    }  # fmt: skip
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return parse_config(raw)


def normalised(images: torch.Tensor, config: Config, dtype: torch.dtype = torch.float32) -> Any:
    """Bytes [B, S, S, 3] as published code wants them: [B, 3, S, S], ToTensor, Normalize."""
    mean, std = (
        torch.tensor(v, dtype=dtype)[:, None, None] for v in (config.data.mean, config.data.std)
    )
    return (images.permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std


def make_batch(
    config: Config, batch: int = 4, step: int = 0, sigmas: tuple[float, ...] = SIGMAS
) -> Batch:
    """Random images and masks; levels and sigma in the layout that ``config.noise`` asks for."""
    g = torch.Generator().manual_seed(1000 + step)
    n = SIDE * SIDE

    def patches(*shape: int) -> torch.Tensor:
        scores = torch.rand(*shape[:-1], n, generator=g)
        return scores.argsort(-1)[..., : shape[-1]].sort(-1).values

    images = torch.randint(0, 256, (batch, 8 * SIDE, 8 * SIDE, 3), generator=g, dtype=torch.uint8)
    context, target = patches(batch, N_CONTEXT), patches(batch, N_BLOCKS, N_TARGETS)
    levels = sigma = None
    if config.noise.weight > 0:
        k = config.noise.levels
        if config.noise.map == "per_block":
            levels = torch.rand(batch, N_BLOCKS, generator=g).argsort(-1) % k
        elif config.noise.map == "all":
            levels = torch.arange(k).repeat_interleave(N_BLOCKS).repeat(batch, 1)
        elif config.noise.map == "per_token":
            levels = torch.randint(0, k, target.shape, generator=g)
        else:
            levels = torch.randint(0, k, (batch, 1), generator=g).repeat(1, N_BLOCKS)
        sigma = torch.tensor(sigmas)[levels]
    return Batch(images, torch.arange(batch) + 7, context, target, levels, sigma, step)
