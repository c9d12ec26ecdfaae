"""The trained network: context encoder, predictors, projector."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from njepa.config import Config
from njepa.data.batch import Lengths
from njepa.models.attention import SDPA, Attention
from njepa.models.encoder import Encoder, build_encoder
from njepa.models.predictor import Predictor, build_predictor
from njepa.models.projector import build_projector


class JepaOutput(NamedTuple):
    """B images, M target blocks, L = M or, where every block is predicted at every level, K*M."""

    context: Tensor
    """[B, Kc, D], the encoded context; zeros where there is padding."""
    clean: Tensor | None
    """[M*B, Kt, D], row m*B + b: predictions without noise. None with one predictor and noise."""
    noised: Tensor | None
    """[L*B, Kt, D], row l*B + b: predictions from noised queries. None without noise."""
    noised_idx: Tensor | None
    """int64 [B, L, Kt]: the patches of ``noised``."""


class Jepa(nn.Module):
    """One encoder pass; each predictor is called once.

    ``predictor`` is clean and ``noise_predictor`` gets the noise; without a ``noise_predictor`` a
    noisy ``predictor`` has all queries noised. Two predictors are what the figure of N-JEPA (arXiv
    2507.15216) shows; the rest is our reading (docs/method.md).
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        noise_predictor: Predictor | None = None,
        projector: nn.Module | None = None,
        level_repeats: int = 1,
    ) -> None:
        """``level_repeats``: K where every block is predicted at all K levels, 1 otherwise."""
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.noise_predictor = noise_predictor
        self.projector = projector
        self.level_repeats = level_repeats

    def forward(
        self,
        images: Tensor,
        context_idx: Tensor,
        target_idx: Tensor,
        sigma: Tensor | None = None,
        sample_ids: Tensor | None = None,
        micro_step: int = 0,
        context_lengths: Lengths | None = None,
    ) -> JepaOutput:
        """Predict the target blocks from the context.

        Args:
            images: uint8 [B, S, S, 3], or normalised [B, 3, S, S]. context_idx: int64 [B, Kc].
            target_idx: int64 [B, M, Kt].
            sigma: fp32 [B, M], [B, M, Kt], or [B, K*M] with block k*M + m at level k where every
                block is predicted at every level; None exactly if no predictor is noisy.
            sample_ids: int64 [B]. micro_step: both key the noise.
            context_lengths: of each image where Kc is padded; None: Kc for all.

        Raises:
            ValueError: sigma missing or unwanted.
        """
        noisy = self.noise_predictor if self.noise_predictor is not None else self.predictor
        if (sigma is None) != (noisy.noise is None):
            raise ValueError(
                "sigma must be given exactly if the model was built with noise (noise.weight > 0); "
                f"got sigma={'None' if sigma is None else list(sigma.shape)} and "
                f"{'no noise' if noisy.noise is None else 'noise'}"
            )
        lengths = context_lengths
        z = self.encoder(images, context_idx, lengths)
        clean = noised = noised_idx = None
        if noisy is not self.predictor or sigma is None:
            clean = self.predictor(z, context_idx, target_idx, context_lengths=lengths)
        if sigma is not None:
            noised_idx = target_idx.repeat(1, self.level_repeats, 1)
            noised = noisy(z, context_idx, noised_idx, sigma, sample_ids, micro_step, lengths)
        return JepaOutput(z, clean, noised, noised_idx)


def build_jepa(
    config: Config, group: dist.ProcessGroup | None = None, attention: Attention = SDPA
) -> Jepa:
    """The network of a configuration, on CPU.

    Every module draws its weights from its own stream, so encoder and predictor are the same with
    and without noise or VICReg. noise.weight=0 builds no second predictor, vicreg.weight=0 no
    projector.

    Args:
        group: ranks that share the projector's statistics, None for a single process.
        attention: what runs the attention of encoder and predictors.
    """
    noise = config.noise
    noisy, second = noise.weight > 0, noise.weight > 0 and noise.predictors == 2
    return Jepa(
        build_encoder(config, attention),
        build_predictor(config, "predictor", noisy and not second, attention),
        build_predictor(config, "noise_predictor", True, attention) if second else None,
        build_projector(config, group) if config.vicreg.weight > 0 else None,
        level_repeats=noise.levels if noise.map == "all" else 1,
    )
