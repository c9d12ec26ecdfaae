"""Weights that were read: one encoder, checked, and all that a source holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from njepa_kernels import Impl

from njepa.config import ConfigError
from njepa.exchange.layouts import State, check_encoder, encoder_facts, to_ours
from njepa.models.architecture import SIZES, Stack
from njepa.models.encoder import Encoder

Which = Literal["target", "context"]
Channels = tuple[float, float, float]

#: What says the facts of an encoder beside its weights, in our own exports.
FACTS = "encoder.json"
#: Of official files, which do not say it (facebookresearch/ijepa, src/transforms.py).
IMAGENET: tuple[Channels, Channels] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder, checked: every tensor is there in its shape, and nothing else."""

    state: State
    """Float32 tensors under our names, which are timm's."""
    width: int
    depth: int
    heads: int
    hidden: int
    """Width inside of the MLP."""
    patch_size: int
    image_size: int
    mean: Channels
    std: Channels
    """Per channel, for pixels in [0, 1]: what the images of its training were normalised with."""
    which: str
    """``target`` or ``context``; ``only`` where the source holds one and does not say which."""
    origin: str
    """Where it comes from and what is assumed about it, for people."""

    @property
    def stack(self) -> Stack:
        return Stack(self.width, self.depth, self.heads, self.hidden)

    def build(self, impl: Impl = "auto") -> Encoder:
        """The encoder in eval mode, on the CPU: bytes [B, S, S, 3] in, [B, N, D] out."""
        encoder = Encoder(
            self.stack, self.image_size, self.patch_size, impl=impl, mean=self.mean, std=self.std
        )
        encoder.load_state_dict(self.state)
        return encoder.eval().requires_grad_(False)


@dataclass(frozen=True)
class Weights:
    """What a source holds. Tensors are read when they are asked for."""

    origin: str
    encoders: dict[str, Callable[[], State]]
    """``target`` and ``context``, or ``only``."""
    predictors: Callable[[], dict[str, State]] = dict
    """``predictor``, and ``noise_predictor`` where there are two."""
    heads: int | None = None
    predictor_heads: int | None = None
    """None where the source does not say: then as many as the encoder has, as published."""
    predictor_context: str | None = None
    """``model.predictor.context``; None: the source does not say, as published files."""
    mean_std: tuple[Channels, Channels] | None = None
    image_size: int | None = None
    """What a run's configuration says."""
    record: dict[str, Any] = field(default_factory=dict)
    """What a run says of itself: recipe, method, step, config, summary, versions."""

    def encoder(self, which: Which) -> EncoderWeights:
        """The encoder that is asked for; the only one where there is but one.

        Raises:
            ConfigError: not there, damaged, or no encoder of this family.
        """
        chosen = "only" if "only" in self.encoders else which
        if chosen not in self.encoders:
            other = ", ".join(self.encoders)
            raise ConfigError(
                f"{self.origin} has no {which} encoder: it holds one encoder, {other}; ask for "
                f"that one"
            )
        told = f"{self.origin}, " + (
            f"its only encoder (asked for: {which})" if chosen == "only" else f"{chosen} encoder"
        )
        state = {name: tensor.float() for name, tensor in to_ours(self.encoders[chosen]()).items()}
        width, depth, hidden, patch_size, side = encoder_facts(state, told)
        heads = self.heads or _published_heads(width, depth, told)
        if width % heads:
            raise ConfigError(f"{told}: width {width} is no multiple of its {heads} heads")
        check_encoder(state, Stack(width, depth, heads, hidden), patch_size, side, told)
        mean, std = self.mean_std or IMAGENET
        if self.mean_std is None:
            told += "; mean and std are not given, ImageNet's are assumed"
        size = patch_size * side
        if self.image_size not in (None, size):
            raise ConfigError(
                f"{told} does not fit its run: got {side} x {side} patches of {patch_size} pixels, "
                f"so images of {size}, expected {self.image_size}; its weights are of another run"
            )
        return EncoderWeights(
            state, width, depth, heads, hidden, patch_size, size, mean, std, chosen, told
        )


def _published_heads(width: int, depth: int, origin: str) -> int:
    """Heads of the published size with these numbers; no tensor's shape tells them."""
    for size in SIZES.values():
        if (size.width, size.depth) == (width, depth):
            return size.heads
    known = ", ".join(f"{s.width} x {s.depth}" for s in SIZES.values())
    raise ConfigError(
        f"{origin}: the number of attention heads is not in the file, and width {width} with "
        f"{depth} blocks is no published size ({known}); give the folder of its run or "
        f"export, which says it, instead of the file alone"
    )
