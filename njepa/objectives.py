"""What the training minimises: prediction losses and VICReg terms.

B images, M target blocks, L noised blocks (M or K*M), Kt targets per block, K levels, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from njepa_kernels import gather_tokens, jepa_loss, vicreg
from torch import Tensor, nn
from torch.nn import functional as F

from njepa.config import Config, NoiseConfig
from njepa.data.batch import Batch
from njepa.models.jepa import JepaOutput

SIGMA_DATA = 1 / math.sqrt(2)  # RMS of the sin-cos position table (our reading)
MAX_WEIGHT = 10.0  # EDM's weight diverges at sigma = 0 (our reading)


class Losses(NamedTuple):
    total: Tensor
    """Scalar, with gradient."""
    metrics: dict[str, Tensor]
    """Detached scalars on the device of ``total``, unweighted."""


def objective(
    config: Config,
    output: JepaOutput,
    h: Tensor,
    batch: Batch,
    projector: nn.Module | None = None,
    group: dist.ProcessGroup | None = None,
) -> Losses:
    """Prediction loss + beta_vicreg * VICReg; metrics ``loss`` and those of the two parts.

    C-JEPA's total, L = L_JEPA + beta_vicreg L_VICReg (arXiv 2410.19560); with noise as well, VICReg
    acts on the clean predictions (our reading).

    Args:
        h: [B, N, D], features of the target encoder: a constant.
        projector: of VICReg; None where ``vicreg.weight`` is 0.
        group: ranks whose batches VICReg's statistics cover, None for a single process.
    """
    total, metrics = prediction_loss(config, output, h, batch)
    if config.vicreg.weight > 0:
        assert projector is not None
        regulariser = vicreg_loss(config, output, h, batch, projector, group)
        total = total + config.vicreg.weight * regulariser.total
        metrics = metrics | regulariser.metrics
    return Losses(total, {"loss": total.detach()} | metrics)


def prediction_loss(config: Config, output: JepaOutput, h: Tensor, batch: Batch) -> Losses:
    """Smooth-L1 to the layer-normed targets: I-JEPA's loss, and N-JEPA's in our reading.

        L = (L_1 + lambda L_2) / Z,   L_2 = mean over b, l, t of w_k(b,l,t) * smooth_l1

    L_1 comes from the clean predictions (facebookresearch/ijepa, src/train.py), L_2 from the noised
    ones. L_2 equals (1/K) sum_k w_k L_2^(k) where every level is equally frequent, and in
    expectation otherwise. Z = 1 + lambda with ``noise.normalise``, else 1. One noisy predictor has
    no clean loss: L = L_2, whatever lambda.

    Metrics: loss_clean, loss_noise, loss_level_<k> (nan for a level that does not occur in this
    batch; unweighted by w_k).
    """
    noise, impl = config.noise, config.impl.default
    metrics: dict[str, Tensor] = {}
    clean = noised = None
    if output.clean is not None:
        clean = jepa_loss(output.clean, h, batch.target_idx, impl=impl).loss
        metrics["loss_clean"] = clean.detach()
    if output.noised is not None:
        assert output.noised_idx is not None
        assert batch.levels is not None
        assert batch.sigma is not None
        weight = level_weight(noise, batch.levels, batch.sigma)
        noised, per_token = jepa_loss(output.noised, h, output.noised_idx, weight, impl=impl)
        metrics["loss_noise"] = noised.detach()
        per_level = loss_per_level(per_token, batch.levels, noise.levels)
        metrics |= {f"loss_level_{k}": value for k, value in enumerate(per_level.unbind())}
    if clean is None:
        assert noised is not None
        return Losses(noised, metrics)
    if noised is None:
        return Losses(clean, metrics)
    total = clean + noise.weight * noised
    return Losses(total / (1.0 + noise.weight) if noise.normalise else total, metrics)


def level_weight(noise: NoiseConfig, levels: Tensor, sigma: Tensor) -> Tensor | None:
    """w_k of each block or token, shaped like ``sigma``; None for 1 everywhere. Our reading.

    A function of sigma as it was drawn (annealing, jitter). ``inv``: 1/(1 + sigma^2/sigma_d^2).
    ``edm``: 1/sigma^2 + 1/sigma_d^2 (arXiv 2206.00364, table 1), at most 10, for it diverges at 0.
    sigma_d = 1/sqrt(2). A list: its entry of the level.
    """
    kind = noise.level_weights
    if kind == "uniform":
        return None
    if kind == "inv":
        return 1.0 / (1.0 + (sigma / SIGMA_DATA).square())
    if kind == "edm":
        return (sigma.square().reciprocal() + 1.0 / SIGMA_DATA**2).clamp(max=MAX_WEIGHT)
    weight = torch.zeros_like(sigma)
    for level, value in enumerate(kind):  # filled on the device: no copy from the host in the step
        weight = weight.masked_fill(levels == level, value)
    return weight


def loss_per_level(per_token: Tensor, levels: Tensor, n_levels: int) -> Tensor:
    """Mean of ``per_token`` [B, L, Kt] over each level: fp32 [K]; nan for one that is absent."""
    values = per_token if levels.dim() == 3 else per_token.mean(dim=-1)
    sums = values.new_zeros(2, n_levels)
    both = torch.stack((values.flatten(), torch.ones_like(values).flatten()))
    sums.index_add_(1, levels.flatten(), both)
    return sums[0] / sums[1]


def vicreg_loss(
    config: Config,
    output: JepaOutput,
    h: Tensor,
    batch: Batch,
    projector: nn.Module,
    group: dist.ProcessGroup | None = None,
) -> Losses:
    """sim * inv + std * v + cov * c of VICReg (arXiv 2105.04906) on the tensors of ``vicreg.on``.

    ``pred_blocks`` (C-JEPA, arXiv 2410.19560, algorithm 1): the mean prediction of each target
    block, projected; the blocks of an image are the views.
    ``pred_vs_target`` (our reading): views u = pi(mean prediction) and t = stop-grad pi(mean
    target), one sample per block; only u gets a gradient, so the variance and covariance act with
    half the weight they have on two trained views.
    ``context``: pi(mean context token, padding left out), no invariance. ``tokens``: pi(every
    predicted token), no invariance.

    Predictions are the clean ones where there are any. No gradient reaches the target encoder.
    Statistics cover the batch of all ranks, in fp32. Metrics: vicreg_inv, vicreg_std, vicreg_cov.
    """
    settings, impl = config.vicreg, config.impl.default
    if output.clean is not None:
        pred, idx = output.clean, batch.target_idx
    else:
        assert output.noised is not None
        assert output.noised_idx is not None
        pred, idx = output.noised, output.noised_idx
    if settings.on == "context":
        lengths = batch.context_lengths
        if lengths is None:
            pooled = output.context.mean(dim=1)
        else:  # padding is zero
            pooled = output.context.sum(dim=1) / lengths.tensor[:, None]
        views = projector(pooled)
    elif settings.on == "tokens":
        views = projector(pred.flatten(0, 1))
    else:
        views = projector(pred.mean(dim=1))
        if settings.on == "pred_blocks":
            views = views.unflatten(0, (idx.shape[1], idx.shape[0]))
        else:
            with torch.no_grad():
                normal = F.layer_norm(h, h.shape[-1:])
                blocks = gather_tokens(normal, idx, impl=impl).mean(dim=2)
                target = projector(blocks.transpose(0, 1).flatten(0, 1))
            views = torch.stack((views, target))
    terms = vicreg(views, settings.gamma, settings.eps, group, impl=impl)
    total = settings.sim * terms.inv + settings.std * terms.std + settings.cov * terms.cov
    metrics = {f"vicreg_{name}": term.detach() for name, term in terms._asdict().items()}
    return Losses(total, metrics)
