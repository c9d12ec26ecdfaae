"""What is probed: an encoder with its preprocessing, whatever its origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from njepa.config import ConfigError, ModelConfig, parse_config
from njepa.models.architecture import Stack, encoder_stack
from njepa.models.encoder import Encoder
from njepa.models.init import init_generator, init_weights, rescale_by_depth

Which = Literal["target", "context"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class EncoderWeights:
    """Weights of an encoder under timm's names, and what they need to run."""

    state: dict[str, Tensor]
    width: int
    depth: int
    heads: int
    hidden: int
    patch_size: int
    image_size: int
    mean: Triple
    std: Triple
    origin: str


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
    """The encoder behind a run folder or a checkpoint of one.

    Raises:
        ConfigError: nothing there that can be read, or weights that do not fit together.
    """
    return as_subject(read_encoder(source, which))


def as_subject(weights: EncoderWeights) -> Subject:
    """The network of these weights.

    Raises:
        ConfigError: names or shapes are not those of an encoder of this architecture.
    """
    encoder = _build(weights)
    own = encoder.state_dict()
    missing, unknown = sorted(own.keys() - weights.state), sorted(weights.state.keys() - own.keys())
    wrong = [
        f"{name} is {list(weights.state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in weights.state and weights.state[name].shape != own[name].shape
    ]
    if missing or unknown or wrong:
        raise ConfigError(
            f"{weights.origin}: no weights of an encoder of {weights.depth} blocks of width "
            f"{weights.width} with patches of {weights.patch_size} at {weights.image_size} px: "
            f"missing {_some(missing)}; unexpected {_some(unknown)}; {'; '.join(wrong[:3])}"
        )
    encoder.load_state_dict(weights.state)
    return Subject(encoder.eval().requires_grad_(False), weights, _digest(encoder, weights))


def untrained(subject: Subject, model: ModelConfig | None = None, seed: int = 0) -> Subject:
    """The same architecture and positions before any training: the floor of the subject.

    Args:
        model: says how weights are drawn; None: as published, std 0.02.
        seed: of the stream ``init/encoder``.
    """
    model, weights = model or ModelConfig(), subject.weights
    encoder = _build(weights)
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
            config = parse_config(yaml.safe_load((folder / "config.yaml").read_text()), source)
            return config.model, config.run.seed
    return None


def _build(weights: EncoderWeights) -> Encoder:
    stack = Stack(weights.width, weights.depth, weights.heads, weights.hidden)
    return Encoder(
        stack, weights.image_size, weights.patch_size, mean=weights.mean, std=weights.std
    ).float()


def _digest(encoder: Encoder, weights: EncoderWeights) -> str:
    facts = [weights.heads, weights.patch_size, weights.image_size, weights.mean, weights.std]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more


def read_encoder(source: str, which: Which) -> EncoderWeights:
    """Weights of a run folder or of one of its checkpoints.

    Raises:
        ConfigError: no run there, no checkpoint in it, or a damaged one.
    """
    path = Path(source)
    if which != "target":
        raise ConfigError(f"{source}: only the target encoder of a run can be read so far")
    run = path if (path / "config.yaml").is_file() else path.absolute().parent.parent
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{source}: expected a run folder (with config.yaml and checkpoints/) or a checkpoint "
            f"in one (checkpoints/step-XXXXXXXX)"
        )
    config = parse_config(yaml.safe_load((run / "config.yaml").read_text()), source)
    checkpoints = [path] if run != path else sorted((run / "checkpoints").glob("step-*"))
    if not checkpoints:
        raise ConfigError(f"{source}: the run has no checkpoint yet; expected checkpoints/step-*")
    file = checkpoints[-1] / "target_encoder.safetensors"
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); probe an older checkpoint") from None
    stack = encoder_stack(config.model)
    return EncoderWeights(
        state, *stack, config.model.patch_size,
        config.data.image_size, config.data.mean, config.data.std, str(file),
    )  # fmt: skip
