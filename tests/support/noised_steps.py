"""Steps of N-JEPA beside their independent twin: batches, weights, targets, the twin's loss."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from njepa_kernels import available_impls
from torch.func import functional_call

from njepa.config import Config
from njepa.data.batch import Batch
from njepa.draws.sigmas import block_sigmas
from njepa.training.module import TrainModule
from tests.support.published_njepa import NJepaLoss, NoiseStream, njepa_loss, philox4x32_10
from tests.support.tiny import N_BLOCKS, make_batch, noise_of, normalised, tiny_config

NATIVE = available_impls()["predictor_tokens"]["native"]
WAYS = [
    pytest.param("reference", torch.float64, 1e-13, id="reference-fp64"),
    pytest.param("reference", torch.float32, 1e-6, id="reference-fp32"),
    pytest.param(
        "native", torch.float32, 1e-6, id="native-fp32",
        marks=pytest.mark.skipif(NATIVE != "yes", reason=NATIVE),
    ),
]  # fmt: skip
SHARING = [(p, m) for p in ("unshared", "shared") for m in ("unshared", "shared")]
#: A list gives the blocks different deviations, so it has no shared draw.
NOISES = [
    (0.5, "per_block"), (0.5, "shared"), ("edm", "per_block"), ("edm", "shared"),
    ([2.0, 0.7, 0.2, 0.0], "per_block"),
]  # fmt: skip
STOPS = [
    ("none", [(0.1, 0.1), (1.0, 0.3)]), ("clean", [(1.0, 0.3)]), ("noised", [(1.0, 0.3)]),
]  # fmt: skip


def build(impl: str, batch: int = 2, step: int = 5, **noise: Any) -> tuple[Config, Batch]:
    """A tiny configuration, and a batch with the sigmas that the trainer draws for it."""
    config = tiny_config("njepa", noise=noise, impl={"default": impl}, run={"seed": 9})
    made = make_batch(config, batch, step)
    ids = torch.arange(batch) * 2**32 + 7 * torch.arange(1, batch + 1)  # more than 32 bits
    drawn = None
    if config.noise.active:
        sigma = block_sigmas(config.noise, N_BLOCKS, config.run.seed, step, ids.numpy())
        drawn = noise_of(config, torch.tensor(sigma), step, ids)
    return config, made._replace(sample_ids=ids, noise=drawn)


def enlarge(module: TrainModule) -> None:
    """Weights at which attention is far from uniform and both parts of smooth-L1 occur."""
    g = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                if parameter.dim() > 1:
                    parameter.mul_(3.0)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))


def stream_of(config: Config, batch: Batch) -> NoiseStream:
    """The key: a word of Philox for the stream's name and the seed of the run, and the step."""
    word = philox4x32_10((zlib.crc32(b"noise"), 0, 0, 0), (config.run.seed, 0))[0]
    shared = config.noise.draw == "shared"
    return NoiseStream(word, batch.micro_step, batch.sample_ids.tolist(), shared)


def twins(module: TrainModule) -> tuple[dict[int, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """An fp64 copy of each parameter by its identity; encoder and two predictors made of copies."""
    copies = {
        id(p): p.detach().double().clone().requires_grad_(p.requires_grad)
        for p in module.parameters()
    }
    jepa = module.jepa
    noisy = jepa.predictor if jepa.noise_predictor is None else jepa.noise_predictor
    parts = [
        {name: copies[id(p)] for name, p in part.named_parameters(remove_duplicate=False)}
        for part in (jepa.encoder, jepa.predictor, noisy)
    ]
    parts[1].pop("noise_mask_token", None)
    token = parts[2].pop("noise_mask_token", None)
    if token is not None:
        parts[2]["mask_token"] = token
    return copies, parts


def target_of(module: TrainModule) -> dict[str, torch.Tensor]:
    """A target that differs from the context encoder, as it does after the first step."""
    g = torch.Generator().manual_seed(3)
    return {
        name: p.detach()
        + (0.02 * torch.randn(p.shape, generator=g).to(p) if p.requires_grad else 0)
        for name, p in module.jepa.encoder.named_parameters()
    }


def features(module: TrainModule, weights: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return functional_call(module.jepa.encoder, weights, (batch.images,))


def oracle(config: Config, batch: Batch, parts: Any, target: dict[str, torch.Tensor]) -> NJepaLoss:
    """Algorithm 1 in fp64, of weights that may be fp32 numbers: the rounding is the trainer's."""
    noise = config.noise
    target = {name: value.double() for name, value in target.items()}
    return njepa_loss(
        *parts, target, (2, 2), normalised(batch.images, config, torch.float64),
        *batch.masks[:2], batch.noise.sigma, stream_of(config, batch),
        noise.weight, noise.consistency, noise.consistency_stop,
    )  # fmt: skip
