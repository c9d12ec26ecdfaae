"""Everything that is built and checked before the first step, from recipe, DeepSpeed file, ranks.

In this order: what can be decided without reading or writing, the run folder, the data, the
network, a checkpoint, the loader.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from njepa.choice import Choice
from njepa.config import Config, ConfigError
from njepa.config.deepspeed_file import BatchSizes, DeepSpeedFile
from njepa.data.batch import Batch
from njepa.data.index import ImageIndex
from njepa.data.loader import Loader, build_loader, choose_backend
from njepa.draws.masks import MaskSampler
from njepa.draws.order import SampleOrder
from njepa.draws.streams import seed_of_try
from njepa.evaluation.evaluate import Evaluator, open_test_side
from njepa.evaluation.online import OnlineProbe, follow_run
from njepa.exchange.initial import InitialWeights, read_initial_weights
from njepa.models.architecture import Architecture, architecture
from njepa.models.attention import Attention
from njepa.models.attention_kernels import choose_attention
from njepa.runs.alike import check_alike, open_alike
from njepa.runs.checkpoints import find_checkpoint, latest_checkpoint, load_checkpoint
from njepa.runs.folder import RunFolder, check_claim, run_dir
from njepa.runs.ranks import Ranks
from njepa.runs.recorder import Recorder
from njepa.runs.rollbacks import read_rollbacks
from njepa.runs.saving import CheckpointWriter
from njepa.training.compiling import GraphedForward, choose_compilation, compile_blocks
from njepa.training.ema import low_target, make_target
from njepa.training.engine import PlainEngine
from njepa.training.fits import check_memory
from njepa.training.fp8_target import choose_target_dtype
from njepa.training.fused_update import check_fused_update
from njepa.training.graphed_step import GraphedStep, check_graphed_step
from njepa.training.impls import choose_impls
from njepa.training.module import TrainModule
from njepa.training.precision import (
    as_precision,
    block_trial,
    choose_precision,
    matrix_units,
    recorded_precision,
)
from njepa.training.schedules import Rates, Schedules
from njepa.training.scoring import Scoring
from njepa.training.step import StepResult, TrainState, training_step
from njepa.training.zero import ZeroEngine, compute_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What runs, decided and checked before anything is read or written."""

    config: Config
    ds: DeepSpeedFile
    """With the precision that was chosen."""
    ranks: Ranks
    sizes: BatchSizes
    parts: Architecture
    precision: Choice
    target: Choice
    """What the target encoder's layers compute in: ``fp32``, ``bf16`` or ``fp8``."""
    impl: dict[str, Choice]
    """By op."""
    attention: Attention
    compilation: Choice
    masks: MaskSampler
    seed: int
    """Behind all draws but those of the weights."""


@dataclass(frozen=True)
class Length:
    """How long the training is, and the rates on the way."""

    total_steps: int
    steps_per_epoch: int
    schedules: Schedules


@dataclass(frozen=True)
class Setup:
    """A run that is ready for the step after ``first_step`` others."""

    plan: Plan
    index: ImageIndex
    order: SampleOrder
    salt: int
    """Rollbacks before."""
    length: Length
    engine: ZeroEngine | PlainEngine
    state: TrainState
    take_step: Callable[[Iterable[Batch], Rates], StepResult]
    """``training_step`` of ``state``, or its CUDA graphs."""
    scoring: Scoring
    recorder: Recorder
    writer: CheckpointWriter
    loader: Loader
    first_step: int
    weights: str
    """What the network started from, for people."""
    online_probe: OnlineProbe | None
    """With ``eval.online``, on every rank; rank 0 logs its own."""

    def close(self) -> None:
        """End the loader's workers and a save, release the run folder; may be called twice."""
        self.loader.close()
        self.writer.close()
        self.recorder.close()


def set_up(
    config: Config, ds: DeepSpeedFile, ranks: Ranks, evaluator: type[Evaluator] = Evaluator,
    *, dry: bool = False,
) -> Setup:  # fmt: skip
    """Build a run, or continue the one in its folder. Collective.

    Args:
        config: the resolved recipe.
        ranks: this process among the others.
        evaluator: what scores the encoders on the labelled test images.
        dry: leave the run folder as it is, claim nothing, and load one step only.

    Raises:
        ConfigError: input that cannot work; nothing was trained or written over.
    """
    check_alike(ranks, config, ds)
    plan = decide(config, ds, ranks)
    initial = _initial_weights(config)
    folder: list[RunFolder] = []  # of rank 0
    ranks.on_main(lambda: check_claim(config) if dry else folder.append(RunFolder(config, ds)))
    recorder = Recorder(folder[0] if folder else None, config.run)
    try:
        salt = ranks.on_main(lambda: len(read_rollbacks(run_dir(config))))
        plan = salted(plan, salt)
        index = open_alike(config, ranks)
        online_probe = follow_run(config, index, ranks.device)
        scorers: list[Evaluator] = []  # of rank 0
        ranks.on_main(lambda: scorers.extend(_open_evaluator(config, index, ranks, evaluator)))
        order = sample_order(plan, index.n)
        length = decide_length(config, order.steps_per_epoch)
        engine, state = build_state(plan, initial)
        first = _resume(plan, index, engine, state, dry) if config.run.resume else 0
        scoring = Scoring(config, state, plan.compilation, scorers[0] if scorers else None)
        writer = CheckpointWriter(
            run_dir(config),
            ranks,
            config.run.keep_checkpoints,
            config.run.keep_every,
            config.run.grace_s,
        )
        take_step: Callable[[Iterable[Batch], Rates], StepResult]
        if isinstance(engine, PlainEngine):
            take_step = graphs = GraphedStep(state, ranks.device)
            graphs.before_update = writer.await_copy
        else:
            take_step = partial(training_step, state)
            engine.before_update = writer.await_copy
        stop = min(first + 1, length.total_steps) if dry else length.total_steps
        loader = build_loader(config, index, order, plan.masks, ranks.device, first, stop)
    except BaseException:
        recorder.close()
        raise
    weights = f"from {initial.told}" if initial is not None else "from the seed"
    return Setup(
        plan, index, order, salt, length, engine, state, take_step, scoring, recorder, writer,
        loader, first, weights, online_probe,
    )  # fmt: skip


def decide(config: Config, ds: DeepSpeedFile, ranks: Ranks) -> Plan:
    """All choices; the first error is raised before anything costs time.

    Raises:
        ConfigError: a configuration that cannot run here.
    """
    sizes, device = ds.resolve(ranks.world), ranks.device
    check_vicreg_batch(config, sizes)
    parts = architecture(config)
    check_memory(config, ds, ranks)
    choose_backend(config.data.backend, device)
    precision = ranks.on_main(lambda: _precision(config, ds, device, parts, sizes.micro))
    ds = replace(ds, precision=as_precision(precision))
    check_fused_update(config, ds)
    check_graphed_step(config, ds, sizes)
    dtype = compute_dtype(ds, device)
    low = dtype != torch.float32
    # Kc is the minimum over all ranks, or, as published, over each on its own.
    together = ranks.world if config.mask.compat == "fixed" else 1
    return Plan(
        config=config,
        ds=ds,
        ranks=ranks,
        sizes=sizes,
        parts=parts,
        precision=precision,
        target=choose_target_dtype(config.model.target_dtype, low, device, parts.encoder),
        impl=choose_impls(config, device),
        attention=choose_attention(
            config.model,
            config.mask,
            {stack.width // stack.heads for stack in (parts.encoder, parts.predictor)},
            device,
            dtype,
        ),
        compilation=choose_compilation(config, ds.stage, device),
        masks=MaskSampler(config.mask, config.grid, config.run.seed, sizes.micro * together),
        seed=config.run.seed,
    )


def salted(plan: Plan, salt: int) -> Plan:
    """The plan with the masks of the try after ``salt`` rollbacks."""
    if not salt:
        return plan
    seed = seed_of_try(plan.config.run.seed, salt)
    masks = plan.masks
    return replace(plan, seed=seed, masks=MaskSampler(masks.config, masks.grid, seed, masks.batch))


def sample_order(plan: Plan, images: int) -> SampleOrder:
    """Which samples this rank sees.

    Raises:
        ConfigError: too few images for a step.
    """
    sizes, ranks = plan.sizes, plan.ranks
    return SampleOrder(images, sizes.micro, sizes.accumulation, sizes.world, ranks.rank, plan.seed)


def _precision(
    config: Config, ds: DeepSpeedFile, device: torch.device, parts: Architecture, micro: int
) -> Choice:
    """That of the run in the folder, or of a new one; rank 0 decides for all."""
    saved = latest_checkpoint(run_dir(config)) if config.run.resume else None
    recorded = None if saved is None else recorded_precision(saved, ds, device.type)
    return choose_precision(
        ds, device.type, lambda: block_trial(parts, micro), recorded, matrix_units()
    )


def decide_length(config: Config, steps_per_epoch: int) -> Length:
    """Steps and schedules of the whole training.

    Raises:
        ConfigError: the warm-up does not fit.
    """
    total = config.run.max_steps or config.optim.epochs * steps_per_epoch
    warmup = round(total * config.optim.warmup_epochs / config.optim.epochs)
    return Length(total, steps_per_epoch, Schedules(config.optim, total, warmup))


def build_state(
    plan: Plan, initial: InitialWeights | None = None
) -> tuple[ZeroEngine | PlainEngine, TrainState]:
    """Network, target encoder and engine, with their first weights; None: from the seed."""
    config, device = plan.config, plan.ranks.device
    module = TrainModule(config, plan.ranks.group, plan.attention)
    target = make_target(module.jepa.encoder)
    if initial is not None:
        initial.load_into(module.jepa, target)
    target.to(device)
    dtype = plan.target.name
    low = low_target(target, fp8=dtype == "fp8") if dtype != "fp32" else None
    running = target if low is None else low.encoder
    if plan.compilation.name == "blocks":
        compile_blocks((module, running), config.mask.static_shapes)
    engine: ZeroEngine | PlainEngine
    if config.run.cuda_graphs == "step":
        clipping = plan.ds.clipping
        engine = PlainEngine(module, config.optim, device, low=low is not None, clipping=clipping)
    else:
        engine = ZeroEngine(module, config.optim, plan.ds, plan.sizes, device)
    graph = GraphedForward(running, engine.autocast) if config.run.cuda_graphs == "target" else None
    return engine, TrainState(engine, target, plan.attention, config.impl.default, graph, low)


def _initial_weights(config: Config) -> InitialWeights | None:
    """Those of ``model.init_from``; a run that continues from its own checkpoint needs none."""
    if config.run.resume and latest_checkpoint(run_dir(config)) is not None:
        return None
    return read_initial_weights(config)


def _open_evaluator(
    config: Config, index: ImageIndex, ranks: Ranks, evaluator: type[Evaluator]
) -> list[Evaluator]:
    """None or one: there may be no labelled test images."""
    test = open_test_side(config, index)
    return [] if test is None else [evaluator(config, index, test, ranks.device)]


def _resume(
    plan: Plan, index: ImageIndex, engine: ZeroEngine | PlainEngine, state: TrainState, dry: bool
) -> int:
    """Load the last good checkpoint; returns the steps that were done."""
    saved = find_checkpoint(run_dir(plan.config), plan.ranks, rename=not dry)
    if saved is None:
        log.warning(
            "run.resume=true, but %s has no checkpoint: starting at step 0", run_dir(plan.config)
        )
        return 0
    upstream = plan.config.mask.compat == "upstream"
    found = load_checkpoint(
        saved, engine.sharding(), state.target, index.digest, plan.sizes, upstream
    )
    with engine.whole(state.online):
        pass  # as at the end of every step: ZeRO 3 gives up what it had gathered of them
    return int(found["step"])


def check_vicreg_batch(config: Config, sizes: BatchSizes) -> None:
    """VICReg needs at least two images in the global micro-batch."""
    if config.vicreg.weight > 0 and sizes.micro * sizes.world < 2:
        raise ConfigError(
            f"vicreg.weight={config.vicreg.weight} compares images and needs a micro-batch of at "
            f"least 2 over all ranks, got {sizes.micro} x {sizes.world} ranks; raise "
            f"train_micro_batch_size_per_gpu or set vicreg.weight=0"
        )
