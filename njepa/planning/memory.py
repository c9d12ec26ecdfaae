"""Bytes on a GPU: states under ZeRO, activations, and the largest micro-batch that fits."""

from __future__ import annotations

from njepa.config import Config
from njepa.config.deepspeed_file import BatchSizes
from njepa.planning.network import Network, Precision, Shape, network, vicreg_rows
from njepa.planning.tokens import drawn_shapes, largest
from njepa.planning.zero import AUTOCAST, ZeroSettings


def activation_bytes(
    config: Config, shape: Shape, batch: int, precision: Precision, checkpointed: bool = False
) -> dict[str, int]:
    """Saved for the backward by a micro-batch, by part; see ``Stack.block_bytes``.

    "weight casts" are the low copies of the weights under autocast. "loss" is that of the reference
    (predictions and target in fp32; the fused ops save less), "vicreg" about three fp32 tensors for
    each layer of the projector. Index tensors and statistics of the batch are left out.
    """
    net, (r, c) = network(config), precision
    e, p, kc, kt = net.encoder, net.predictor, shape.context, shape.target
    # The patch embedding's weight is not needed again: bytes have no gradient.
    casts = net.matrix_parameters - net.matrix_biases - net.patch_values * e.width
    predictor, loss = 0, config.mask.n_targets * kt * 4 * e.width  # the target, of both predictions
    for number, blocks in enumerate(net.passes):
        tied = net.parts.tied_noise and number == len(net.passes) - 1
        if number == 0 or tied or c < r:  # a tensor of its own; autocast casts for each predictor
            entering = kc + (config.mask.n_targets * kt + 1 if tied else 0)
            predictor += entering * c * e.width  # input of predictor_embed
        rows = net.predictor_rows(shape, blocks)
        predictor += p.saved_bytes(rows, precision, checkpointed, blocks * kt)
        if net.parts.shared_context:
            # The context's keys and values, copied beside each block's, and, but for the last
            # layer, the joined results.
            layers = min(p.depth, 2) if checkpointed else p.depth
            joined = (layers - 1) * rows
            copied = (1 if checkpointed else p.depth) * 2 * blocks * (kc + kt)
            predictor += c * p.width * (copied + joined)
        predictor += blocks * kt * c * p.width  # input of predictor_proj
        loss += blocks * kt * 4 * e.width
    result = {
        "patches": batch * kc * net.patch_values * c,
        "context encoder": batch * e.saved_bytes(kc, precision, checkpointed),
        "predictor": batch * predictor,
        "loss": batch * loss,
        "weight casts": c * casts if c < r else 0,
    }
    if config.vicreg.weight > 0:
        widths = net.projector[1:] or (e.width,)
        result["vicreg"] = vicreg_rows(config, batch) * 12 * sum(widths)
    return result


def state_bytes(net: Network, zero: ZeroSettings, world: int) -> dict[str, float]:
    """Held between and during steps by each rank.

    DeepSpeed's ZeRO keeps an fp32 master copy of its shard even where the parameters are fp32.
    Buckets: stages 1 to 3 hold one for each type that gradients are communicated in (autocast: bf16
    and fp32); those of stages 1 and 2 have the type of the parameters, and are two with
    overlap_comm. Gathered: parameters that stage 3 may hold at once. The target encoder is whole on
    every rank, with a bf16 copy where that is what it computes with, and one of its blocks'
    weights in fp8 beside it where they multiply so (the scales are left out).
    """
    count, width = net.trained_parameters, zero.precision.parameter
    stage, shard = zero.stage, net.trained_parameters / world
    kinds = 2 if zero.precision is AUTOCAST else 1
    low = zero.precision.compute < 4
    bucket = zero.bucket * (width * kinds * (1 + zero.overlap))
    if stage == 3:
        bucket = zero.bucket * (6 if kinds == 2 else width)
    return {
        "parameters": width * (count + net.frozen_parameters) / (world if stage == 3 else 1),
        "gradients": width * (shard if stage >= 2 else count),
        "master": 4 * shard if stage else 0,
        "optimizer": 8 * (shard if stage else count),
        "target": (4 + 2 * low) * net.target_parameters + low * net.fp8_weights,
        "buckets": bucket if stage else 0,
        "gathered": width * min(count, zero.live) if stage == 3 else 0,
    }


def peak_bytes(
    config: Config, shape: Shape, batch: int, zero: ZeroSettings, world: int, checkpointed: bool
) -> float:
    """Largest sum of states, features, activations and workspace in a step (an estimate)."""
    net = network(config)
    e, p, precision = net.encoder, net.predictor, zero.precision
    states = sum(state_bytes(net, zero, world).values())
    features = batch * net.patches * precision.compute * e.width
    target = e.workspace_bytes(batch * net.patches, precision)
    target += batch * net.patches * precision.compute * 4 * e.width  # q, k, v and their result
    rows = batch * max(net.predictor_rows(shape, blocks) for blocks in net.passes)
    work = max(
        e.workspace_bytes(batch * shape.context, precision), p.workspace_bytes(rows, precision)
    )
    saved = sum(activation_bytes(config, shape, batch, precision, checkpointed).values())
    return states + max(target, features + saved + work)


def largest_micro_batch(
    config: Config, zero: ZeroSettings, world: int, capacity: float, checkpointed: bool
) -> int:
    """The largest micro-batch whose ``peak_bytes`` is within ``capacity``; 0: not even one."""

    def fits(batch: int) -> bool:
        shape = largest(drawn_shapes(config, BatchSizes(batch, 1, world)))
        return peak_bytes(config, shape, batch, zero, world, checkpointed) <= capacity

    smallest = 2 if config.vicreg.weight > 0 and world == 1 else 1
    if not fits(smallest):
        return 0
    low, high = smallest, 2 * smallest
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):  # within 1.6 %
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
