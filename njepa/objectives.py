"""What the training minimises: prediction losses and VICReg terms.

B images, M target blocks, Kt targets per block, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from njepa_kernels import Impl, jepa_loss, vicreg
from torch import Tensor, nn
from torch.nn import functional as F

from njepa.config import Config, NoiseConfig, VicregConfig
from njepa.data.batch import Masks
from njepa.models.jepa import JepaOutput


class Losses(NamedTuple):
    total: Tensor
    """Scalar, with gradient."""
    metrics: dict[str, Tensor]
    """Detached scalars on the device of ``total``, unweighted."""


def objective(
    config: Config,
    output: JepaOutput,
    h: Tensor,
    masks: Masks,
    projector: nn.Module | None = None,
    group: dist.ProcessGroup | None = None,
) -> Losses:
    """Prediction loss + beta_vicreg * VICReg; metrics ``loss`` and those of the two parts.

    C-JEPA's total, L = L_JEPA + beta_vicreg L_VICReg (arXiv 2410.19560); with noise as well, a
    combination of ours, L_JEPA is N-JEPA's loss and VICReg acts on the clean predictions.

    Args:
        h: [B, N, D], features of the target encoder: a constant.
        projector: of VICReg; None where ``vicreg.weight`` is 0.
        group: ranks whose batches VICReg's statistics cover, None for a single process.
    """
    impl = config.impl.default
    total, metrics = prediction_loss(config.noise, output, h, masks, impl)
    if config.vicreg.weight > 0:
        assert projector is not None
        regulariser = vicreg_loss(config.vicreg, output, h, masks, projector, group, impl)
        total = total + config.vicreg.weight * regulariser.total
        metrics = metrics | regulariser.metrics
    return Losses(total, {"loss": total.detach()} | metrics)


def prediction_loss(
    noise: NoiseConfig, output: JepaOutput, h: Tensor, masks: Masks, impl: Impl = "auto"
) -> Losses:
    """N-JEPA's loss (arXiv 2507.15216, eq. 7-10); without noise I-JEPA's, its first term.

        L = L_CT + lambda1 L_NT + lambda2 L_CN

    L_CT and L_NT: smooth-L1 of the clean and of the noised predictions to the layer-normed targets.
    L_CN: mean squared difference of the two predictions, with gradient into both unless
    ``noise.consistency_stop`` says otherwise. A single, noised predictor has L = L_NT.

    Metrics: loss_clean, loss_noise, loss_consistency, as far as they exist.
    """
    if output.clean is None or output.noised is None:
        pred = output.noised if output.clean is None else output.clean
        assert pred is not None
        name = "loss_noise" if output.clean is None else "loss_clean"
        terms = jepa_loss(pred, h, masks.target_idx, impl=impl)
        return Losses(terms.loss, {name: terms.clean})
    terms = jepa_loss(
        output.clean,
        h,
        masks.target_idx,
        output.noised,
        noise_weight=noise.weight,
        consistency=noise.consistency,
        consistency_stop=noise.consistency_stop,
        impl=impl,
    )
    assert terms.noised is not None
    assert terms.consistency is not None
    return Losses(
        terms.loss,
        {
            "loss_clean": terms.clean,
            "loss_noise": terms.noised,
            "loss_consistency": terms.consistency,
        },
    )


def vicreg_loss(
    settings: VicregConfig,
    output: JepaOutput,
    h: Tensor,
    masks: Masks,
    projector: nn.Module,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Losses:
    """sim * inv + std * v + cov * c of VICReg (arXiv 2105.04906) on the tensors of ``vicreg.on``.

    C-JEPA (arXiv 2410.19560) gives two specifications that differ:

    ``pred_blocks`` (algorithm 1): the mean prediction of each target block, projected; the blocks
    of an image are the views. The predictions are the clean ones where there are any.
    ``context_vs_target`` (pseudo-code C.2): inv = mse(u, t) with u = pi(mean context token, padding
    left out), t = stop-grad pi(mean token of h); v(u) and c(u) of the context alone, each once.
    That means are taken, and over which tokens, is our reading.

    No gradient reaches the target encoder. Statistics cover the batch of all ranks, in fp32.
    Metrics: vicreg_inv, vicreg_std, vicreg_cov.
    """
    if settings.on == "pred_blocks":
        pred = output.noised if output.clean is None else output.clean
        assert pred is not None
        views = projector(pred.mean(dim=1)).unflatten(0, (-1, len(output.context)))
        inv, std, cov = vicreg(views, settings.gamma, settings.eps, group, impl=impl)
    else:
        lengths = masks.context_lengths
        if lengths is None:
            pooled = output.context.mean(dim=1)
        else:  # padding is zero
            pooled = output.context.sum(dim=1) / lengths.tensor[:, None]
        context = projector(pooled)
        with torch.no_grad():
            target = projector(h.mean(dim=1))
        _, std, cov = vicreg(context, settings.gamma, settings.eps, group, impl=impl)
        cov = 0.5 * cov  # the op adds the covariances of two views
        inv = F.mse_loss(context.float(), target.float())
    total = settings.sim * inv + settings.std * std + settings.cov * cov
    metrics = {"vicreg_inv": inv, "vicreg_std": std, "vicreg_cov": cov}
    return Losses(total, {name: term.detach() for name, term in metrics.items()})
