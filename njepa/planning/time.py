"""Predicted time of a step from the ceilings of a GPU and its links."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from njepa.config import Config
from njepa.config.deepspeed_file import BatchSizes
from njepa.planning.flops import mean_flops
from njepa.planning.network import network
from njepa.planning.traffic import traffic_bytes
from njepa.planning.zero import ZeroSettings


@dataclass(frozen=True)
class Gpu:
    """Ceilings of a GPU and its links. Those in ``GPUS`` are nominal, not measured."""

    memory: float
    """Bytes."""
    flops: float
    """Dense bf16 FLOP/s."""
    bandwidth: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s that a GPU sends to its node."""
    internode: float = 400e9
    """Bytes/s that a node of 8 sends to others (eight links of 400 Gbit/s)."""


#: Vendors' numbers, nominal, not measured.
GPUS = {
    "a100": Gpu(80e9, 312e12, 2.04e12, 300e9, 200e9),
    "h100": Gpu(80e9, 989.4e12, 3.35e12, 450e9),
    "h200": Gpu(141e9, 989.4e12, 4.8e12, 450e9),
    "b200": Gpu(180e9, 2250e12, 8e12, 900e9),
}
GPUS_PER_NODE = 8


class StepTime(NamedTuple):
    """Seconds of one optimizer step."""

    compute: float
    update: float
    traffic: float
    backward: float
    """The part of ``compute`` that traffic may hide under."""

    @property
    def serial(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.update + self.traffic

    @property
    def overlapped(self) -> float:
        """Traffic hides under the backward as far as it is long."""
        return self.compute + self.update + max(0.0, self.traffic - self.backward)


def step_time(
    config: Config, sizes: BatchSizes, zero: ZeroSettings, gpu: Gpu, efficiency: float
) -> StepTime:
    """Predicted time of a step from ceilings, without latencies, stragglers or data loading.

    compute = useful FLOPs / (efficiency * flops); update = bytes of AdamW (28 a parameter of the
    shard) and of the EMA (12) over the memory's bandwidth; traffic = bytes of ``traffic_bytes``
    over the slower of the links that the ring crosses.
    """
    net, flops = network(config), mean_flops(config, sizes)
    rate = efficiency * gpu.flops
    forward = sizes.accumulation * sum(f.forward for f in flops.values()) / rate
    backward = sizes.accumulation * sum(f.backward for f in flops.values()) / rate
    shard = net.trained_parameters / (sizes.world if zero.stage else 1)
    update = (28 * shard + 12 * net.encoder_parameters) / gpu.bandwidth
    link = gpu.nvlink if sizes.world <= GPUS_PER_NODE else min(gpu.nvlink, gpu.internode)
    sent = traffic_bytes(net, zero, sizes.world)
    for name in sent:
        each = zero.stage >= 2 and name.endswith("of gradients")
        if each or (zero.stage == 3 and name.endswith("of parameters")):
            sent[name] *= sizes.accumulation  # for every micro-batch
    return StepTime(forward + backward, update, sum(sent.values()) / link, backward)


def with_ceilings(gpu: Gpu, **given: float | None) -> Gpu:
    """``gpu`` with what is given in place of its nominal numbers."""
    return replace(gpu, **{name: value for name, value in given.items() if value is not None})
