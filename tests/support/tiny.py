"""A tiny configuration and random batches for the tests of models, objectives and step."""

from __future__ import annotations

from typing import Any

import torch
from njepa_kernels import NoiseKey

from njepa.config import Config, parse_config
from njepa.data.batch import Batch, Masks, Noise
from njepa.draws.streams import stream_seed

SIDE, N_BLOCKS, N_CONTEXT, N_TARGETS = 6, 4, 10, 5
SIGMAS = (1.5, 0.5, 0.25, 0.1)


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
    """Random images and masks; where there is noise, ``sigmas`` over the blocks of each image."""
    g = torch.Generator().manual_seed(1000 + step)
    n = SIDE * SIDE

    def patches(*shape: int) -> torch.Tensor:
        scores = torch.rand(*shape[:-1], n, generator=g)
        return scores.argsort(-1)[..., : shape[-1]].sort(-1).values

    images = torch.randint(0, 256, (batch, 8 * SIDE, 8 * SIDE, 3), generator=g, dtype=torch.uint8)
    context, target = patches(batch, N_CONTEXT), patches(batch, N_BLOCKS, N_TARGETS)
    noise, ids = None, torch.arange(batch) + 7
    if config.noise.active:
        order = torch.rand(batch, N_BLOCKS, generator=g).argsort(-1)
        noise = noise_of(config, torch.tensor(sigmas)[order % len(sigmas)], step, ids)
    return Batch(images, Masks(context, target), noise, ids, step)


def noise_of(config: Config, sigma: torch.Tensor, step: int, ids: torch.Tensor) -> Noise:
    """The noise of a micro-step, keyed as the loader keys it."""
    shared = config.noise.draw == "shared"
    return Noise(sigma, NoiseKey(stream_seed(config.run.seed, "noise"), step, ids, shared))


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some images of a dense batch."""
    noise = batch.noise
    if noise is not None:
        ids = noise.key.sample_ids[rows]
        noise = Noise(noise.sigma[rows], noise.key._replace(sample_ids=ids))
    context_idx, target_idx, _ = batch.masks
    masks = Masks(context_idx[rows], target_idx[rows])
    return batch._replace(
        images=batch.images[rows], masks=masks, noise=noise, sample_ids=batch.sample_ids[rows]
    )
