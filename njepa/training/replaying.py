"""A bad step once more: from the checkpoint of its dump, with the same draws, looked at closely."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from njepa.config import ConfigError, parse_config
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.data.loader import build_loader
from njepa.data.sources import open_source
from njepa.exchange.initial import read_initial_weights
from njepa.runs.checkpoint_files import CheckpointFiles
from njepa.runs.checkpoints import load_checkpoint
from njepa.runs.dumps import Dump, number
from njepa.runs.ranks import Ranks
from njepa.training.setup import build_state, decide, decide_length, salted, sample_order
from njepa.training.step import training_step
from njepa.training.watching import FirstNotFinite, watch


@dataclass(frozen=True)
class Replayed:
    bad: bool
    norm: float | str
    terms: list[dict[str, float | str]]
    """Of this rank's micro-steps."""
    seen: FirstNotFinite
    came_from: str
    exact: bool
    """Whether this many ranks trained."""


def replay(dump: Dump, run: Path, ranks: Ranks) -> Replayed:
    """Repeat the step of a dump, and the steps from its checkpoint to there. Collective.

    With another number of ranks than in the training each holds a larger or smaller part of every
    micro-batch: the same samples and draws, values up to the rounding of reductions.

    Raises:
        ConfigError: a number of ranks that does not divide the micro-batch, other data, or a
            checkpoint that is gone or damaged.
    """
    together = dump.micro * dump.ranks
    if together % ranks.world:
        raise ConfigError(
            f"the step had micro-batches of {together} images over all ranks, which {ranks.world} "
            f"ranks cannot share; start {dump.ranks} or 1"
        )
    raw = {k: v for k, v in dump.ds.items() if k != "train_batch_size"} | {
        "train_micro_batch_size_per_gpu": together // ranks.world,
        "gradient_accumulation_steps": dump.accumulation,
    }
    sections = dict(dump.config)
    sections["run"] = dict(sections.get("run") or {}) | {"compile": "off", "cuda_graphs": "off"}
    config, ds = parse_config(sections, "the dump's configuration"), parse_deepspeed(raw)
    ds = replace(ds, precision=dump.precision)
    plan = salted(decide(config, ds, ranks), dump.salt)
    saved = None if dump.checkpoint is None else CheckpointFiles(_inside(run, dump.checkpoint))
    if saved is not None:
        saved.verify()
    initial = None if saved is not None else read_initial_weights(config)
    index = open_source(config.data.path, config.data.cache_dir, progress=False)
    if index.digest != dump.data_digest:
        raise ConfigError(
            f"the images are others than those of the training (index digest {index.digest[:12]}, "
            f"then {dump.data_digest[:12]}); restore them"
        )
    order = sample_order(plan, index.n)
    length = decide_length(config, order.steps_per_epoch)
    engine, state = build_state(plan, initial)
    first = 0
    if saved is not None:
        upstream = config.mask.compat == "upstream"
        sharding = engine.sharding()
        found = load_checkpoint(saved, sharding, state.target, index.digest, plan.sizes, upstream)
        first = int(found["step"])
    loader = build_loader(config, index, order, plan.masks, ranks.device, first, dump.step + 1)
    try:
        for step in range(first, dump.step):
            training_step(state, islice(loader, dump.accumulation), length.schedules.at(step))
        with watch({"trained": engine.module, "target": state.running}) as seen:
            batches = islice(loader, dump.accumulation)
            result = training_step(state, batches, length.schedules.at(dump.step))
    finally:
        loader.close()
    engine.close()
    return Replayed(
        bad=bool(result.update.bad),
        norm=number(float(result.update.norm)),
        terms=[
            {name: number(float(value)) for name, value in micro.metrics.items()}
            for micro in result.micro_batches
        ],
        seen=seen,
        came_from="the first weights" if saved is None else f"{saved.folder} (step {first})",
        exact=ranks.world == dump.ranks,
    )


def _inside(run: Path, name: str) -> Path:
    """A folder of the run, whatever a dump that was edited says."""
    path = (run / name).resolve()
    if run.resolve() not in path.parents or not path.is_dir():
        raise ConfigError(
            f"the dump's checkpoint {name!r} is not a folder inside of {run}; keep the dump in "
            f"its run folder, with the folder kept/ beside it"
        )
    return path
