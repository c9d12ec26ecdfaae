"""Useful FLOPs of a step: one multiply-add is two, and only matrix products count.

As in ``torch.utils.flop_counter``, with which tests/trainer/planning/test_planning.py compares.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from njepa.config import Config
from njepa.config.deepspeed_file import BatchSizes
from njepa.planning.network import Network, Shape, network, vicreg_rows
from njepa.planning.tokens import drawn_shapes


class Flops(NamedTuple):
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def step_flops(config: Config, shape: Shape, batch: int, world: int = 1) -> dict[str, Flops]:
    """Useful FLOPs of a micro-batch of one rank, by phase.

    Useful: what the mathematics needs once. Recomputation, by checkpointing or inside of a fused
    attention, does not count. The backward of a product is two products, except where the input
    needs no gradient.
    """
    net = network(config)
    e, p, kc, kt = net.encoder, net.predictor, shape.context, shape.target
    embed = 2 * net.patch_values * e.width  # of one patch; the context embeds its own alone
    context, target = e.flops(kc), e.flops(net.patches)
    predictor = Flops(0.0, 0.0)
    for number, blocks in enumerate(net.passes):
        noised = len(net.passes) - 1 == number
        rows = kc + (config.mask.n_targets * kt + 1 if noised and net.parts.tied_noise else 0)
        products = 2.0 * rows * e.width * p.width
        products += net.predictor_flops(shape, blocks) + blocks * 2 * kt * p.width * e.width
        predictor = Flops(predictor.forward + products, predictor.backward + 2 * products)
    result = {
        "patch embedding, target": Flops(net.patches * embed, 0.0),
        "target encoder": Flops(target, 0.0),
        "patch embedding, context": Flops(kc * embed, kc * embed),
        "context encoder": Flops(context, 2 * context),
        "predictor": predictor,
    }
    result = {name: Flops(f.forward * batch, f.backward * batch) for name, f in result.items()}
    if config.vicreg.weight > 0:
        result |= _vicreg_flops(config, net, batch, world)
    return result


def _vicreg_flops(config: Config, net: Network, batch: int, world: int) -> dict[str, Flops]:
    """Projector, and the covariance of its output from the cheaper of the two products."""
    on = config.vicreg.on
    views = config.mask.n_targets if on == "pred_blocks" else 1
    rows = vicreg_rows(config, batch)
    layer = sum(2 * i * o for i, o in pairwise(net.projector))
    n = world * batch
    width = net.projector[-1] if net.projector else net.encoder.width
    product = 2.0 * views * n * width * min(n, width)
    without_gradient = rows * layer if on == "context_vs_target" else 0
    return {
        "projector": Flops(rows * layer + without_gradient, 2 * rows * layer),
        "vicreg": Flops(product, 2 * product),
    }


def mean_flops(config: Config, sizes: BatchSizes) -> dict[str, Flops]:
    """``step_flops`` of a micro-batch, averaged over the drawn shapes."""
    shapes = drawn_shapes(config, sizes)
    sums: dict[str, Flops] = {}
    for shape, count in shapes.items():
        for name, f in step_flops(config, shape, sizes.micro, sizes.world).items():
            old, share = sums.get(name, Flops(0, 0)), count / shapes.total()
            sums[name] = Flops(old.forward + share * f.forward, old.backward + share * f.backward)
    return sums


def recomputed_flops(config: Config, shape: Shape, batch: int) -> float:
    """What checkpointing of all blocks of context encoder and predictors adds."""
    net = network(config)
    predictor = sum(net.predictor_flops(shape, blocks) for blocks in net.passes)
    return batch * (net.encoder.flops(shape.context) + predictor)
