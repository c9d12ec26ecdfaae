"""What a step costs, computed from the configuration: FLOPs, bytes on a GPU, bytes on the wire.

Pure functions; no GPU, no weights. One multiply-add is two FLOPs and only matrix products count, as
in ``torch.utils.flop_counter``; tests/trainer/test_planning.py compares with it, with built models,
with saved tensors and with real engines.

B images of a micro-batch, N patches, Kc context tokens, Kt tokens of a target block, M blocks, D
and d widths of encoder and predictor, H hidden width of an MLP.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from njepa.config import Config, ConfigError, MaskConfig
from njepa.ds_engine import BatchSizes
from njepa.masking import MaskSampler
from njepa.models.predictor import check_sizes

#: Steps whose masks are drawn, and images at most among which the shortest context is sought. More
#: images would shorten it, so costs are over- and never under-estimated by the second.
STEPS, IMAGES = 64, 2048


class Shape(NamedTuple):
    """Token counts of one step."""

    context: int
    target: int


class Flops(NamedTuple):
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


class Precision(NamedTuple):
    """Bytes per number of the parameters and the residual stream, and of what matmuls read."""

    parameter: int
    compute: int


FP32, AUTOCAST, BF16 = Precision(4, 4), Precision(4, 2), Precision(2, 2)


@dataclass(frozen=True)
class Stack:
    """A stack of pre-norm transformer blocks."""

    width: int
    depth: int
    heads: int
    hidden: int

    @property
    def matrix_parameters(self) -> int:
        """Weights and biases of qkv, proj, fc1 and fc2."""
        d, h = self.width, self.hidden
        return self.depth * (4 * d * d + 4 * d + 2 * d * h + h + d)

    @property
    def norm_parameters(self) -> int:
        """Two norms a block and the one behind the last."""
        return (2 * self.depth + 1) * 2 * self.width

    def flops(self, tokens: int) -> float:
        """Forward of all blocks, for one sequence."""
        return self.depth * self.block_flops(tokens, tokens**2)

    def block_flops(self, tokens: int, pairs: int, queries: int | None = None) -> float:
        """Forward of one block: 6nD^2 for qkv, 2n(D^2 + 2DH), and 4D for a pair of query and key.

        ``queries``: how many tokens go on behind qkv; None: all.
        """
        d, h = self.width, self.hidden
        behind = tokens if queries is None else queries
        return 6 * tokens * d * d + 2 * behind * (d * d + 2 * d * h) + 4 * d * pairs

    def block_bytes(self, precision: Precision, tokens: int, queries: int | None = None) -> int:
        """Saved for the backward by one block; ``queries`` as in ``block_flops``.

        The inputs of both norms in the type of the residual stream; the inputs of the four linear
        layers, q, k and v, and the input of GELU in that of the matmuls; mean and reciprocal
        deviation of two norms and the log-sum-exp of each head in fp32. Attention must not store
        its probabilities (any fused SDPA).
        """
        r, c = precision
        d, h = self.width, self.hidden
        behind = tokens if queries is None else queries
        to_qkv = tokens * (r * d + 8 + c * 4 * d)
        return to_qkv + behind * (r * d + 8 + c * (2 * d + 2 * h) + 4 * self.heads)

    def saved_bytes(
        self,
        rows: int,
        precision: Precision,
        checkpointed: bool = False,
        queries: int | None = None,
    ) -> int:
        """Saved by all blocks for ``rows`` tokens, and by the norm behind them.

        ``checkpointed``: the input of every block, and everything of the one that is recomputed.
        ``queries``: how many tokens leave the last block; None: all.
        """
        r, d = precision.parameter, self.width
        last = self.block_bytes(precision, rows, queries)
        full = self.block_bytes(precision, rows) if self.depth > 1 else last
        blocks = (self.depth - 1) * full + last
        if checkpointed:
            blocks = self.depth * rows * r * d + full
        return blocks + (rows if queries is None else queries) * (r * d + 8)

    def workspace_bytes(self, rows: int, precision: Precision) -> int:
        """Alive at once while one block runs, beyond what it saves: our estimate.

        Forward or backward, the largest are two tensors of the MLP's hidden width in the type of
        the matmuls, and three of the residual stream.
        """
        return rows * (precision.compute * 2 * self.hidden + precision.parameter * 3 * self.width)


@dataclass(frozen=True)
class Network:
    """The shapes of a configuration."""

    patches: int
    patch_values: int
    """Numbers in a patch: 3 P^2."""
    encoder: Stack
    predictor: Stack
    passes: tuple[int, ...]
    """Blocks per image in each call of a predictor (one call each)."""
    predictors: int
    mask_tokens: int
    projector: tuple[int, ...]
    """Widths from input to output; empty: none, or the identity."""
    shared_context: bool
    """The predictor computes the context once for all blocks."""
    tied_noise: bool
    """Noise of the encoder's width goes through the embedding of the last pass."""

    def predictor_rows(self, shape: Shape, blocks: int) -> int:
        """Tokens in the predictor for one image."""
        kc, kt = shape
        return kc + blocks * kt if self.shared_context else blocks * (kc + kt)

    def predictor_flops(self, shape: Shape, blocks: int) -> float:
        """Forward of the predictor's blocks for one image; the queries alone leave the last."""
        (kc, kt), p = shape, self.predictor
        rows, queries = self.predictor_rows(shape, blocks), blocks * kt
        asked = queries * (kc + kt)
        pairs = asked + (kc * kc if self.shared_context else blocks * kc * (kc + kt))
        return (p.depth - 1) * p.block_flops(rows, pairs) + p.block_flops(rows, asked, queries)

    @property
    def encoder_parameters(self) -> int:
        """Trained, and followed by the target encoder; the position table is not among them."""
        d = self.encoder.width
        matrices = self.encoder.matrix_parameters + (self.patch_values + 1) * d
        return matrices + self.encoder.norm_parameters

    @property
    def matrix_parameters(self) -> int:
        """Trained in Linear and Conv2d layers: those whose gradients autocast communicates low."""
        d, e = self.predictor.width, self.encoder.width
        predictor = self.predictor.matrix_parameters + (e + 1) * d + (d + 1) * e
        return (
            self.encoder_parameters
            - self.encoder.norm_parameters
            + self.predictors * predictor
            + sum(i * o for i, o in pairwise(self.projector))
        )

    @property
    def matrix_biases(self) -> int:
        """The biases among ``matrix_parameters``."""
        e, p = self.encoder, self.predictor
        blocks = [s.depth * (5 * s.width + s.hidden) for s in (e, p)]
        predictor = blocks[1] + p.width + e.width
        return blocks[0] + e.width + self.predictors * predictor

    @property
    def trained_parameters(self) -> int:
        d = self.predictor.width
        rest = self.predictors * self.predictor.norm_parameters + self.mask_tokens * d
        batch_norms = 2 * sum(self.projector[1:-1])
        return self.matrix_parameters + self.encoder.norm_parameters + rest + batch_norms

    @property
    def frozen_parameters(self) -> int:
        """Position tables of encoder and predictors."""
        return self.patches * (self.encoder.width + self.predictors * self.predictor.width)

    @property
    def target_parameters(self) -> int:
        """The target encoder with its position table, on every rank, in fp32."""
        return self.encoder_parameters + self.patches * self.encoder.width


def network(config: Config) -> Network:
    """Shapes of a configuration.

    Raises:
        ConfigError: sizes that cannot work, or contexts of different lengths.
    """
    if config.mask.ragged:
        raise ConfigError(
            "mask.ragged=true is not covered by `njepa plan`: every image has its own number of "
            "context tokens; plan with mask.ragged=false, where contexts are shorter"
        )
    size, part, noise = check_sizes(config), config.model.predictor, config.noise
    blocks, noisy = config.mask.n_targets, noise.active
    passes: tuple[int, ...] = (blocks,)
    two = noisy and noise.predictors != "single"  # predictions
    if two:
        passes = (blocks, blocks) if noise.predictors == "unshared" else (2 * blocks,)
    widths = config.vicreg.projector
    projector: tuple[int, ...] = ()
    if config.vicreg.weight > 0 and widths != "identity":
        projector = (size.width, *(widths or (size.width,) * 3))
    return Network(
        patches=math.prod(config.grid),
        patch_values=3 * config.model.patch_size**2,
        encoder=Stack(size.width, size.depth, size.heads, int(size.width * size.mlp_ratio)),
        predictor=Stack(part.width, part.depth, part.heads or size.heads, 4 * part.width),
        passes=passes,
        predictors=len(passes),
        mask_tokens=2 if two and noise.mask_token == "unshared" else 1,
        projector=projector,
        shared_context=part.context == "shared",
        tied_noise=noisy and noise.space == "encoder_tied",
    )


# ---- tokens -------------------------------------------------------------------------------------


def drawn_shapes(config: Config, sizes: BatchSizes) -> Counter[Shape]:
    """How often each shape occurs in ``STEPS`` steps of this run.

    The shortest context of the global micro-batch (``mask.compat=fixed``) or of a rank's
    (``upstream``) is everyone's, so Kc falls with the batch.
    """
    images = sizes.micro * (sizes.world if config.mask.compat == "fixed" else 1)
    return _drawn(config.mask, config.grid, config.run.seed, min(images, IMAGES))


@lru_cache(maxsize=256)
def _drawn(mask: MaskConfig, grid: tuple[int, int], seed: int, images: int) -> Counter[Shape]:
    sampler, ids = MaskSampler(mask, grid, seed, images), np.arange(images, dtype=np.int64)
    masks = (sampler(step, ids) for step in range(STEPS))
    return Counter(Shape(m.context_idx.shape[-1], m.target_idx.shape[-1]) for m in masks)


def largest(shapes: Iterable[Shape]) -> Shape:
    """The largest Kc and the largest Kt, of whichever steps."""
    counts = list(shapes)
    return Shape(max(s.context for s in counts), max(s.target for s in counts))


# ---- FLOPs --------------------------------------------------------------------------------------


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
        rows = kc + (config.mask.n_targets * kt + 1 if noised and net.tied_noise else 0)
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
    rows = _vicreg_rows(config, batch)
    layer = sum(2 * i * o for i, o in pairwise(net.projector))
    n = world * batch
    width = net.projector[-1] if net.projector else net.encoder.width
    product = 2.0 * views * n * width * min(n, width)
    without_gradient = rows * layer if on == "context_vs_target" else 0
    return {
        "projector": Flops(rows * layer + without_gradient, 2 * rows * layer),
        "vicreg": Flops(product, 2 * product),
    }


def _vicreg_rows(config: Config, batch: int) -> int:
    """Rows that the projector sees with gradient."""
    return (config.mask.n_targets if config.vicreg.on == "pred_blocks" else 1) * batch


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


# ---- activations --------------------------------------------------------------------------------


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
        tied = net.tied_noise and number == len(net.passes) - 1
        if number == 0 or tied or c < r:  # a tensor of its own; autocast casts for each predictor
            entering = kc + (config.mask.n_targets * kt + 1 if tied else 0)
            predictor += entering * c * e.width  # input of predictor_embed
        rows = net.predictor_rows(shape, blocks)
        predictor += p.saved_bytes(rows, precision, checkpointed, blocks * kt)
        if net.shared_context:
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
        result["vicreg"] = _vicreg_rows(config, batch) * 12 * sum(widths)
    return result


# ---- a GPU under ZeRO ---------------------------------------------------------------------------


class ZeroSettings(NamedTuple):
    """What of the DeepSpeed file decides about memory and traffic; defaults are DeepSpeed's."""

    stage: int
    precision: Precision
    bucket: int = 500_000_000
    """reduce_bucket_size, elements."""
    overlap: bool = False
    live: int = 1_000_000_000
    """stage3_max_live_parameters, elements."""
    all_reduce: bool = True
    """use_multi_rank_bucket_allreduce: stages 1 and 2 all-reduce and keep their shard."""


def zero_settings(ds: dict[str, Any], cuda: bool = True) -> ZeroSettings:
    """From a DeepSpeed file as ``load_ds_config`` returns it; ``auto`` autocast is on with CUDA."""
    zero, autocast = ds.get("zero_optimization", {}), ds.get("torch_autocast", {})
    stage = zero.get("stage", 0)
    enabled = autocast.get("enabled", False)
    precision = FP32
    if ds.get("bf16", {}).get("enabled", False):
        precision = BF16
    elif enabled is True or (enabled == "auto" and cuda):
        precision = AUTOCAST
    overlap = zero.get("overlap_comm")
    return ZeroSettings(
        stage,
        precision,
        int(zero.get("reduce_bucket_size", 5e8)),
        stage == 3 if overlap is None else bool(overlap),
        int(zero.get("stage3_max_live_parameters", 1e9)),
        bool(zero.get("use_multi_rank_bucket_allreduce", True)),
    )


def state_bytes(net: Network, zero: ZeroSettings, world: int) -> dict[str, float]:
    """Held between and during steps by each rank.

    DeepSpeed's ZeRO keeps an fp32 master copy of its shard even where the parameters are fp32.
    Buckets: stages 1 to 3 hold one for each type that gradients are communicated in (autocast: bf16
    and fp32); those of stages 1 and 2 have the type of the parameters, and are two with
    overlap_comm. Gathered: parameters that stage 3 may hold at once. The target encoder is whole on
    every rank.
    """
    count, width = net.trained_parameters, zero.precision.parameter
    stage, shard = zero.stage, net.trained_parameters / world
    kinds = 2 if zero.precision is AUTOCAST else 1
    bucket = zero.bucket * (width * kinds * (1 + zero.overlap))
    if stage == 3:
        bucket = zero.bucket * (6 if kinds == 2 else width)
    return {
        "parameters": width * (count + net.frozen_parameters) / (world if stage == 3 else 1),
        "gradients": width * (shard if stage >= 2 else count),
        "master": 4 * shard if stage else 0,
        "optimizer": 8 * (shard if stage else count),
        "target": 4 * net.target_parameters,
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


def traffic_bytes(net: Network, zero: ZeroSettings, world: int) -> dict[str, float]:
    """Bytes that each rank sends in one optimizer step of one micro-batch, by rings of all ranks.

    A ring all-reduce of b bytes sends 2 (n-1)/n b, a reduce-scatter or all-gather (n-1)/n b.
    Stages 1 and 2 all-reduce gradients by default, where half of it would do (DeepSpeed 0.19.8,
    zero/stage_1_and_2.py, ``allreduce_and_scatter``), and then collect the updated parameters.
    Stage 3 gathers parameters for the forward, again for the backward, and the encoder's in fp32
    for the target encoder. Under torch_autocast stages 1 to 3 send the gradients of Linear and
    Conv2d layers in bf16, and stage 3 such parameters too; stage 0 sends fp32. With accumulation,
    stages 2 and 3 send gradients for every micro-batch.
    """
    ring = (world - 1) / world
    width = zero.precision.parameter
    full = width * net.trained_parameters
    low = full
    if zero.precision is AUTOCAST:
        low = 4 * net.trained_parameters - 2 * net.matrix_parameters
    follow = 0.0
    if zero.precision is BF16 and zero.stage:
        follow = 4 * net.encoder_parameters  # the shards of the fp32 master
    elif zero.stage == 3:
        follow = width * net.encoder_parameters
    if zero.stage == 0:
        return {"all-reduce of gradients": 2 * ring * full}
    twice = zero.stage < 3 and zero.all_reduce
    return {
        f"{'all-reduce' if twice else 'reduce-scatter'} of gradients": ring * low * (1 + twice),
        "all-gather of parameters": ring * (2 * low if zero.stage == 3 else full),
        "all-gather for the target": ring * follow,
    }


# ---- time ---------------------------------------------------------------------------------------


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


def with_stage(zero: ZeroSettings, stage: int) -> ZeroSettings:
    """The same settings at another stage; overlap_comm is DeepSpeed's default for stage 3."""
    return zero._replace(stage=stage, overlap=zero.overlap or stage == 3)


def with_ceilings(gpu: Gpu, **given: float | None) -> Gpu:
    """``gpu`` with what is given in place of its nominal numbers."""
    return replace(gpu, **{name: value for name, value in given.items() if value is not None})
