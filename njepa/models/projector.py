"""The projector in front of VICReg, and a BatchNorm over the batches of all ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from njepa.models.init import init_generator


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; the backward sums too, so that it is the gradient of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grads[0], ctx.group), None


class DistributedBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over [n, C] with the statistics of all ranks, on any backend, in fp32.

    Averaging parameter gradients over ranks (DDP, ZeRO) gives the gradient that one process has on
    the concatenated batch, if the loss is a mean over ranks or the same on all. torch's
    SyncBatchNorm does the same on GPUs only.
    """

    def __init__(self, num_features: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(num_features)
        self.group = group

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float()
        count = x.new_full((1,), x.shape[0])
        sums = self._sum(torch.cat((x.sum(dim=0), count)))
        n, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred = x - mean
        variance = self._sum(centred.square().sum(dim=0)) / n
        with torch.no_grad():
            unbiased = variance * (n / (n - 1).clamp(min=1))
            for buffer, value in ((self.running_mean, mean), (self.running_var, unbiased)):
                if buffer is not None:
                    buffer.lerp_(value.to(buffer.dtype), self.momentum or 0.1)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        normal = centred * (variance + self.eps).rsqrt()
        return (normal * self.weight.float() + self.bias.float()).to(input.dtype)

    def _sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.group is None else _SumOverRanks.apply(tensor, self.group)


def build_projector(
    widths: tuple[int, ...], seed: int, group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Linear-BatchNorm-ReLU layers and a last Linear without bias, from stream ``init/projector``.

    The shape of VICReg's expander (facebookresearch/vicreg, main_vicreg.py), torch's default init;
    without the biases that a BatchNorm cancels. C-JEPA does not state its projector: the default
    widths (D, D, D) are our reading.

    Args:
        widths: from input to output; empty: the identity.
        seed: of the run.
        group: ranks that share statistics, None for a single process.
    """
    if not widths:
        return nn.Identity()
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        for fan_in, fan_out in pairwise(widths):
            layers += [
                nn.Linear(fan_in, fan_out, bias=False),
                DistributedBatchNorm(fan_out, group),
                nn.ReLU(),
            ]
    projector = nn.Sequential(*layers[:-2])
    generator = init_generator(seed, "projector")
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
    return projector
