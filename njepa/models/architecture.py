"""What a configuration builds: every size and part, decided once for models and planning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from njepa.config import Config, ConfigError, ModelConfig, did_you_mean


class Stack(NamedTuple):
    """A stack of transformer blocks."""

    width: int
    depth: int
    heads: int
    hidden: int
    """Width inside of the MLP."""


class EncoderSize(NamedTuple):
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


#: facebookresearch/ijepa, src/models/vision_transformer.py.
SIZES = {
    "vit_tiny": EncoderSize(192, 12, 3),
    "vit_small": EncoderSize(384, 12, 6),
    "vit_base": EncoderSize(768, 12, 12),
    "vit_large": EncoderSize(1024, 24, 16),
    "vit_huge": EncoderSize(1280, 32, 16),
    "vit_giant": EncoderSize(1408, 40, 16, 48 / 11),
}


@dataclass(frozen=True)
class Architecture:
    grid: tuple[int, int]
    """Patches per column and per row."""
    patch_size: int
    encoder: Stack
    predictor: Stack
    shared_context: bool
    """The predictor computes the context once for all blocks."""
    clean: bool
    noised: bool
    """Whether there is a prediction from clean queries, and one from noised ones."""
    two_predictors: bool
    """Each prediction has a predictor of its own."""
    two_mask_tokens: bool
    """Noised queries start from a mask token of their own."""
    tied_noise: bool
    """Noise of the encoder's width goes through the predictor's embedding."""
    projector: tuple[int, ...] | None
    """Widths of VICReg's projector from input to output; empty: the identity. None: no VICReg."""


def architecture(config: Config) -> Architecture:
    """What ``config`` builds.

    Raises:
        ConfigError: unknown encoder, or a width that heads or the position table cannot divide.
    """
    model, noise, vicreg = config.model, config.noise, config.vicreg
    encoder, part = encoder_stack(model), model.predictor
    heads = part.heads or encoder.heads
    _check_heads("model.predictor", part.width, heads)
    both = noise.active and noise.predictors != "single"
    projector: tuple[int, ...] | None = None
    if vicreg.weight > 0:
        widths = vicreg.projector or (encoder.width,) * 3
        projector = () if widths == "identity" else (encoder.width, *widths)
    return Architecture(
        grid=config.grid,
        patch_size=model.patch_size,
        encoder=encoder,
        predictor=Stack(part.width, part.depth, heads, 4 * part.width),
        shared_context=part.context == "shared",
        clean=not noise.active or both,
        noised=noise.active,
        two_predictors=both and noise.predictors == "unshared",
        two_mask_tokens=both and noise.mask_token == "unshared",
        tied_noise=noise.active and noise.space == "encoder_tied",
        projector=projector,
    )


def encoder_stack(model: ModelConfig) -> Stack:
    """The named size with the overrides of the configuration.

    Raises:
        ConfigError: unknown name, or a width that heads or the position table cannot divide.
    """
    if model.encoder not in SIZES:
        raise ConfigError(
            f"model.encoder={model.encoder!r} is unknown"
            f"{did_you_mean(model.encoder, list(SIZES))}; known: {', '.join(SIZES)}"
        )
    named = SIZES[model.encoder]
    width, heads = model.width or named.width, model.heads or named.heads
    if width % 4:
        raise ConfigError(
            f"model.width must be a multiple of 4 (2-D sin-cos positions), got {width}"
        )
    _check_heads("model", width, heads)
    return Stack(width, model.depth or named.depth, heads, int(width * named.mlp_ratio))


def _check_heads(section: str, width: int, heads: int) -> None:
    if width % heads:
        fitting = [n for n in range(1, width + 1) if width % n == 0]
        near = min(fitting, key=lambda n: abs(n - heads))
        raise ConfigError(
            f"{section}.width={width} must be a multiple of {section}.heads={heads}; "
            f"set {section}.heads={near}, for example"
        )
