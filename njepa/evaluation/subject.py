"""What is probed: an encoder with its preprocessing, whatever its origin."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from njepa.config import ModelConfig, load_config
from njepa.exchange.reading import EncoderWeights, Which, read_encoder
from njepa.models.encoder import Encoder
from njepa.models.init import init_generator, init_weights, rescale_by_depth

__all__ = ["Subject", "Which", "as_subject", "init_of_run", "open_subject", "untrained"]


@dataclass(frozen=True)
class Subject:
    """A frozen encoder, fp32 and in eval mode."""

    encoder: Encoder
    weights: EncoderWeights
    digest: str
    """SHA-256 over weights and preprocessing: equal digests have equal features."""

    @property
    def image_size(self) -> int:
        return self.weights.image_size


def open_subject(source: str, which: Which = "target") -> Subject:
    """An encoder from a run, a checkpoint, an export, an official file, timm or transformers.

    Raises:
        ConfigError: nothing there that can be read, or weights that do not fit together.
    """
    return as_subject(read_encoder(source, which))


def as_subject(weights: EncoderWeights) -> Subject:
    """The network of these weights."""
    encoder = weights.build()
    return Subject(encoder, weights, _digest(encoder, weights))


def untrained(subject: Subject, model: ModelConfig | None = None, seed: int = 0) -> Subject:
    """The same architecture and positions before any training: the floor of the subject.

    Args:
        model: says how weights are drawn; None: as published, std 0.02.
        seed: of the stream ``init/encoder``.
    """
    model, weights = model or ModelConfig(), subject.weights
    encoder = weights.build()
    init_weights(encoder, model, init_generator(seed, "encoder"))
    if model.depth_rescaled_init:
        rescale_by_depth(encoder.blocks)
    with torch.no_grad():
        encoder.pos_embed.copy_(subject.encoder.pos_embed)
    return Subject(encoder.eval().requires_grad_(False), weights, _digest(encoder, weights))


def init_of_run(source: str) -> tuple[ModelConfig, int] | None:
    """How a run drew its first weights, and its seed; None where the source is no run."""
    for folder in (Path(source), *Path(source).absolute().parents[:2]):
        if (folder / "config.yaml").is_file():
            config = load_config(str(folder / "config.yaml"))
            return config.model, config.run.seed
    return None


def _digest(encoder: Encoder, weights: EncoderWeights) -> str:
    facts = [weights.heads, weights.patch_size, weights.image_size, weights.mean, weights.std]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
