"""The trained network: context encoder, predictors, projector."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from njepa.config import Config
from njepa.data.batch import Masks, Noise
from njepa.models.architecture import architecture
from njepa.models.attention import SDPA, Attention
from njepa.models.encoder import Encoder, build_encoder
from njepa.models.predictor import Predictor, build_predictor
from njepa.models.projector import build_projector


class JepaOutput(NamedTuple):
    """B images, M target blocks."""

    context: Tensor
    """[B, Kc, D], the encoded context; zeros where there is padding."""
    clean: Tensor | None
    """[M*B, Kt, D], row m*B + b: predictions without noise. None with a single, noised one."""
    noised: Tensor | None
    """[M*B, Kt, D], row m*B + b: predictions from noised queries. None without noise."""


class Jepa(nn.Module):
    """One encoder pass, then both predictions; the blocks of each predictor run once.

    N-JEPA (arXiv 2507.15216, algorithm 1): ``predictor`` is clean, ``noise_predictor`` gets the
    noise on the positions of its queries, and they differ in nothing else. Without a
    ``noise_predictor``, ``predictor`` makes the noised prediction too.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        noise_predictor: Predictor | None = None,
        projector: nn.Module | None = None,
        predicts: tuple[bool, bool] = (True, False),
    ) -> None:
        """``predicts``: whether there is a clean and a noised prediction."""
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.noise_predictor = noise_predictor
        self.projector = projector
        self.predicts = predicts

    def forward(self, images: Tensor, masks: Masks, noise: Noise | None = None) -> JepaOutput:
        """Predict the target blocks from the context.

        Args:
            images: uint8 [B, S, S, 3].
            noise: None exactly if no prediction is noised.

        Raises:
            ValueError: noise missing or unwanted.
        """
        wants_clean, wants_noised = self.predicts
        if (noise is not None) != wants_noised:
            raise ValueError(
                "noise must be given exactly if the model was built with it (noise.weight or "
                f"noise.consistency > 0); got {'none' if noise is None else 'some'} and a model "
                f"{'with' if wants_noised else 'without'} a noised prediction"
            )
        z = self.encoder(images, masks.context_idx, masks.context_lengths)
        clean = noised = None
        if self.noise_predictor is None and wants_clean and wants_noised:
            both = self.predictor(z, masks, noise, with_clean=True)
            clean, noised = both.chunk(2)
        else:
            if wants_clean:
                clean = self.predictor(z, masks)
            if wants_noised:
                noisy = self.predictor if self.noise_predictor is None else self.noise_predictor
                noised = noisy(z, masks, noise)
        return JepaOutput(z, clean, noised)


def build_jepa(
    config: Config, group: dist.ProcessGroup | None = None, attention: Attention = SDPA
) -> Jepa:
    """The network of a configuration, on CPU.

    Every module draws its weights from its own stream, so encoder and predictor are the same with
    and without noise or VICReg. Without noise there is no second predictor, with vicreg.weight=0
    no projector.

    Args:
        group: ranks that share the projector's statistics, None for a single process.
        attention: what runs the attention of encoder and predictors.
    """
    parts = architecture(config)
    own_token = parts.two_mask_tokens and not parts.two_predictors
    predictor = build_predictor(config, "predictor", attention, noise_mask_token=own_token)
    noise_predictor = None
    if parts.two_predictors:
        noise_predictor = build_predictor(config, "noise_predictor", attention)
        if not parts.two_mask_tokens:  # one parameter of both modules
            noise_predictor.mask_token = predictor.mask_token
    projector = None
    if parts.projector is not None:
        projector = build_projector(parts.projector, config.run.seed, group)
    return Jepa(
        build_encoder(config, attention),
        predictor,
        noise_predictor,
        projector,
        (parts.clean, parts.noised),
    )
