"""Noise levels of the target blocks: how large σ is, and which block of which image gets which.

OUR READING of N-JEPA (arXiv:2507.15216). The abstract says that diffusion noise enters through the
position embedding of masked tokens, on several levels; it gives no values. The number of levels,
every schedule and map below is a choice of this project (docs/method.md). Published parts: the σ
grid of Karras et al. (EDM, arXiv:2206.00364, eq. 5), its log-normal distribution (table 1), and the
VP schedule of Song et al. (arXiv:2011.13456, appendix C).
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from njepa.config import NoiseConfig
from njepa.randomness import Float64Array, Int64Array, uniform, uniform_of_step

Float32Array = npt.NDArray[np.float32]

P_MEAN, P_STD = -1.2, 1.2  # ln σ of EDM's training distribution
BETA_D, BETA_MIN = 19.9, 0.1  # VP: σ(t)² = exp(β_d t²/2 + β_min t) - 1


class Levels(NamedTuple):
    """The level and the σ of every predicted block, or of every predicted token."""

    levels: Int64Array
    """[G, M]; map per_token: [G, M, Kt]; map all: [G, K M], level-major (block k M + m)."""
    sigma: Float32Array
    """Like ``levels``, in the unit of the position table."""


def schedule(config: NoiseConfig) -> Float64Array:
    """σ of the K levels in the unit of the config, [K]; the largest first (``list``: as given).

    With f the fraction of the way from the first to the last level (K = 1: f = 0):
    karras: (σ_max^(1/ρ) + f (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ;
    linear: in σ; cosine: σ = tan(angle), linear in the angle; vp: linear in the time of VP;
    edm_lognormal: exp(-1.2 + 1.2 z) at the middles of K equally likely bins of EDM's ln σ;
    fixed: σ_max.
    """
    levels, low, high = config.levels, config.sigma_min, config.sigma_max
    match config.schedule:
        case "karras":
            root = 1 / config.rho
            return np.linspace(high**root, low**root, levels) ** config.rho
        case "edm_lognormal":
            middles = [NormalDist().inv_cdf((k + 0.5) / levels) for k in reversed(range(levels))]
            return np.exp(P_MEAN + P_STD * np.array(middles))
        case "linear":
            return np.linspace(high, low, levels)
        case "cosine":
            return np.tan(np.linspace(math.atan(high), math.atan(low), levels))
        case "vp":
            t = np.linspace(_vp_time(high), _vp_time(low), levels)
            return np.sqrt(np.expm1(BETA_D * t**2 / 2 + BETA_MIN * t))
        case "fixed":
            return np.array([high])
        case "list":
            assert config.sigmas is not None  # the configuration checks it
            return np.array(config.sigmas, dtype=np.float64)


class NoiseLevels:
    """Levels of a batch as a pure function of (seed, step, sample ids), without state.

    Args:
        config: section ``noise``.
        n_targets: M, target blocks per image.
        pos_rms: root mean square of the predictor's position table; the unit of σ if
            ``config.unit`` is relative.
        seed: run seed; the stream is "level".
        total_steps: steps of the training, for ``anneal_to``.

    Raises:
        ValueError: map per_block with more levels than blocks; pos_rms or total_steps not positive.
    """

    def __init__(
        self, config: NoiseConfig, n_targets: int, pos_rms: float, seed: int, total_steps: int
    ) -> None:
        if config.weight > 0 and config.map == "per_block" and config.levels > n_targets:
            raise ValueError(
                f"noise.map=per_block places at most mask.n_targets={n_targets} levels on an "
                f"image, got noise.levels={config.levels}; lower noise.levels or set "
                f"noise.map=per_token, per_sample or all"
            )
        if not pos_rms > 0 or total_steps < 1:
            raise ValueError(
                f"noise levels need pos_rms > 0 and total_steps >= 1, "
                f"got pos_rms={pos_rms} and total_steps={total_steps}"
            )
        self.config, self.n_targets, self.seed = config, n_targets, seed
        self._unit = pos_rms if config.unit == "relative" else 1.0
        self._table = schedule(config) * self._unit
        self._last_step = max(total_steps - 1, 1)

    @property
    def active(self) -> bool:
        """Whether there is a noised branch at all."""
        return self.config.weight > 0

    def sigmas(self, step: int) -> Float32Array:
        """σ of the K levels at a 0-based optimizer step, [K] (jitter: the bins' middles)."""
        return (self._table * self._annealing(step)).astype(np.float32)

    def assign(self, step: int, sample_ids: Int64Array, n_tokens: int) -> Levels:
        """Levels of the samples [G] at an optimizer step; ``n_tokens`` Kt is for per_token only.

        per_block: each level on M div K or M div K + 1 blocks of every image, all such arrangements
        equally likely; per_token, per_sample, per_batch: uniform and independent per token, image,
        step; all: every block at every level. What shares a level shares its σ.
        """
        levels, place = self._draw(step, sample_ids, n_tokens)
        if self.config.jitter:
            quantile = (self.config.levels - 1 - levels + place) / self.config.levels
            z = torch.special.ndtri(torch.from_numpy(quantile)).numpy()
            sigma = np.exp(P_MEAN + P_STD * z) * (self._unit * self._annealing(step))
        else:
            sigma = self._table[levels] * self._annealing(step)
        blocks = self.n_targets * (self.config.levels if self.config.map == "all" else 1)
        shape = (len(sample_ids), blocks) + (n_tokens,) * (self.config.map == "per_token")
        return Levels(
            np.ascontiguousarray(np.broadcast_to(levels, shape)),
            np.ascontiguousarray(np.broadcast_to(sigma.astype(np.float32), shape)),
        )

    def _annealing(self, step: int) -> float:
        """1 at step 0, ``anneal_to`` from the last step on, linear in between."""
        if self.config.anneal_to is None:
            return 1.0
        return 1.0 + min(step / self._last_step, 1.0) * (self.config.anneal_to - 1.0)

    def _draw(self, step: int, ids: Int64Array, n_tokens: int) -> tuple[Int64Array, Float64Array]:
        """Levels and, for the jitter, places in (0, 1) inside their bins, in broadcastable shapes.

        The words of the levels come first, so the jitter does not change them.
        """
        levels, blocks = self.config.levels, self.n_targets

        def draw(n_level: int, n_place: int) -> tuple[Float64Array, Float64Array]:
            count = n_level + n_place * self.config.jitter
            u = uniform(self.seed, "level", step, ids, count)
            return u[:, :n_level], _middle(u[:, n_level:])

        match self.config.map:
            case "per_block":
                u, place = draw(levels + blocks, blocks)
                # Levels in random order, dealt out in turn, to blocks in random order.
                dealt = np.argsort(u[:, :levels], axis=1)[:, np.arange(blocks) % levels]
                order = np.argsort(u[:, levels:], axis=1)
                return np.take_along_axis(dealt, order, axis=1), place
            case "per_token":
                u, place = draw(blocks * n_tokens, blocks * n_tokens)
                shape = (len(ids), blocks, n_tokens)
                place = place.reshape(shape) if self.config.jitter else place
                return (u.reshape(shape) * levels).astype(np.int64), place
            case "per_sample":
                u, place = draw(1, 1)
                return (u * levels).astype(np.int64), place
            case "per_batch":
                u_level, u_place, *_ = uniform_of_step(self.seed, "level", step)
                return np.array([[int(u_level * levels)]]), _middle(np.array([[u_place]]))
            case "all":
                _, place = draw(0, levels * blocks)
                return np.repeat(np.arange(levels), blocks)[None], place


def _vp_time(sigma: float) -> float:
    """The time at which VP has this σ: the positive root of β_d t²/2 + β_min t = ln(1 + σ²)."""
    return (math.sqrt(BETA_MIN**2 + 2 * BETA_D * math.log1p(sigma**2)) - BETA_MIN) / BETA_D


def _middle(u: Float64Array) -> Float64Array:
    """Multiples of 2^-32 in [0, 1) moved to the middles of their cells: at 0, σ would be 0."""
    return u + 2.0**-33
