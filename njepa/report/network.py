"""The network of a checkpoint, to look at what it sees; nothing is trained here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from njepa.config import Config, ConfigError
from njepa.evaluation.predicting import load_jepa
from njepa.exchange.reading import open_weights
from njepa.models.encoder import Encoder
from njepa.models.jepa import Jepa
from njepa.report.images import StepViews
from njepa.report.record import RunRecord

#: Multiply-adds, roughly, that a page may spend on the neighbours' features.
_EFFORT = {"cpu": 4e11, "cuda": 2e14}
_BANK = (32, 1000)
_BATCH = 32


@dataclass(frozen=True)
class Network:
    """Target encoder, and what predicts its features where the checkpoint has it whole."""

    target: Encoder
    jepa: Jepa | None
    absent: str
    """Why there is no ``jepa``."""
    device: torch.device

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Features of all patches, float32 [n, N, D] on the CPU; images uint8 [n, S, S, 3]."""
        batches = images.split(_BATCH)
        return torch.cat([self.target(x.to(self.device)).float().cpu() for x in batches])

    def bank_size(self) -> int:
        """How many images the neighbours are searched among, so that it takes seconds."""
        weights = sum(p.numel() for p in self.target.blocks.parameters())
        cost = weights * self.target.pos_embed.shape[1]
        fitting = int(_EFFORT[self.device.type] / max(cost, 1))
        return min(max(fitting, _BANK[0]), _BANK[1])


def open_network(run: RunRecord, config: Config, device: torch.device) -> Network:
    """The network of the newest checkpoint, in fp32.

    Raises:
        ConfigError: the target encoder cannot be read.
    """
    weights = open_weights(run.path)
    target = weights.encoder("target").build().to(device)
    try:
        jepa = load_jepa(config, weights, weights.predictors())
        return Network(target, jepa.to(device), "", device)
    except ConfigError as error:
        return Network(target, None, str(error), device)


class Errors(NamedTuple):
    """How far predictions are from the features of the target encoder, patch by patch."""

    maps: dict[str, Tensor]
    """``clean`` and ``noised``, as far as they exist: float32 [n, N], NaN outside of targets."""
    constant: float
    """The same for whoever always predicts the mean feature: what a collapsed encoder makes easy.
    """

    def mean(self, branch: str) -> float:
        return float(self.maps[branch].nanmean())


@torch.no_grad()
def prediction_errors(jepa: Jepa, network: Network, views: StepViews) -> Errors:
    """smooth-L1 to the layer-normed target features, mean over their dimensions (objectives.py).

    Where target blocks overlap, a patch has the mean over its blocks.
    """
    device = network.device
    images, masks = views.images.to(device), views.masks.to(device)
    noise = None if views.noise is None else views.noise.to(device)
    output = jepa(images, masks, noise)
    h = network.target(images).float()
    h = F.layer_norm(h, h.shape[-1:])
    n, blocks = masks.target_idx.shape[:2]
    rows = masks.target_idx.flatten(1)
    wanted = h.gather(1, rows[..., None].expand(-1, -1, h.shape[-1]))  # [n, M*Kt, D]
    maps = {}
    for branch, predicted in (("clean", output.clean), ("noised", output.noised)):
        if predicted is not None:
            # Rows are block by block, image by image: [M*n, Kt, D] to [n, M*Kt, D].
            by_image = predicted.float().unflatten(0, (blocks, n)).transpose(0, 1).flatten(1, 2)
            maps[branch] = _on_grid(_distance(by_image, wanted), rows, h.shape[1]).cpu()
    mean = h.flatten(0, 1).mean(0).expand_as(wanted)
    return Errors(maps, float(_distance(mean, wanted).mean()))


def _distance(predicted: Tensor, wanted: Tensor) -> Tensor:
    return F.smooth_l1_loss(predicted, wanted, reduction="none").mean(-1)


def _on_grid(values: Tensor, rows: Tensor, patches: int) -> Tensor:
    """Means of ``values`` [n, K] at the patches ``rows``; NaN where there is none."""
    total = values.new_zeros(len(values), patches).scatter_add_(1, rows, values)
    count = torch.zeros_like(total).scatter_add_(1, rows, torch.ones_like(values))
    return torch.where(count > 0, total / count, torch.nan)
