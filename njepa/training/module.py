"""The one module that is trained, batch and target features in, loss and metrics out; its AdamW."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from njepa.config import Config, OptimConfig
from njepa.data.batch import Batch
from njepa.models.attention import SDPA, Attention
from njepa.models.jepa import build_jepa
from njepa.objectives import objective
from njepa.training.fused_update import FusedAdamW


class TrainModule(nn.Module):
    """Network and objective; what ``deepspeed.initialize`` gets."""

    def __init__(
        self,
        config: Config,
        group: dist.ProcessGroup | None = None,
        attention: Attention = SDPA,
    ) -> None:
        """``group``: ranks over which VICReg's statistics run, None for a single process."""
        super().__init__()
        self.config, self.group = config, group
        self.jepa = build_jepa(config, group, attention)

    def forward(self, batch: Batch, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch, and detached scalar metrics.

        Args:
            h: [B, N, D], all features of the target encoder, computed without gradient.
        """
        output = self.jepa(batch.images, batch.masks, batch.noise)
        losses = objective(self.config, output, h, batch.masks, self.jepa.projector, self.group)
        return losses.total, losses.metrics


def adamw(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of ``param_groups``; fused, which is also what lets it skip a bad step."""
    kind = FusedAdamW if optim.fused_update else torch.optim.AdamW
    return kind(
        param_groups(module, optim.weight_decay),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: {params, weight_decay, decayed}, the decayed one first.

    Decayed: more or fewer than one dimension and no "bias" in the name, so the mask token too.
    The rule of facebookresearch/ijepa, src/helper.py, whose four groups these two merge; frozen
    position tables are left out. Call it before ZeRO-3 flattens the parameters.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[parameter.dim() != 1 and "bias" not in name].append(parameter)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0, "decayed": decayed}
        for decayed, params in groups.items()
    ]
