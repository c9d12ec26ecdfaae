"""A start without a run: everything built and checked, one batch, and what would happen in words.

The set-up is that of a run, so that it finds what a start would find. What it leaves out: the run
folder, the evaluation, and the update of the weights. Only ``data.cache_dir`` may be written.
"""

from __future__ import annotations

import logging
import math
import shutil
import time

import torch

from njepa import planning
from njepa.config import Config, ConfigError
from njepa.config.deepspeed_file import DeepSpeedFile
from njepa.data.batch import Batch
from njepa.data.errors import DataError
from njepa.runs.folder import existing_part, run_dir
from njepa.runs.ranks import Ranks
from njepa.runs.room import free_memory
from njepa.training.engine import Engine
from njepa.training.masks_text import masks_text
from njepa.training.setup import Setup, set_up
from njepa.training.start_table import start_table, table

log = logging.getLogger(__name__)

#: On a CPU forward and backward are tried up to so many floating-point operations: seconds.
_TRIED = 3e11


def dry_run(config: Config, ds: DeepSpeedFile, ranks: Ranks) -> str:
    """Set up as a start would, take one micro-batch, and describe both. Collective.

    Raises:
        ConfigError: what a start would refuse, a batch that cannot be loaded, or a step that does
            not fit into the GPU.
    """
    began, free = time.perf_counter(), free_memory(ranks)
    setup = set_up(config, ds, ranks, dry=True)
    try:
        batch = _first_batch(setup)
        rows = {
            "parameters": _parameters(setup.engine),
            "memory": _memory(setup, free),
            "checkpoint": _disk(setup),
            **_batch(setup, batch),
        }
        unreadable = ranks.sum(len(setup.loader.skipped))
    finally:
        setup.close()
    left_out = len(setup.index.unreadable)
    rows["unreadable"] = (
        f"{left_out} images left out of the index, {unreadable} of the first that were read"
    )
    rows["dry run"] = (
        f"nothing trained or written but data.cache_dir, {time.perf_counter() - began:.1f} s"
    )
    return f"{start_table(setup)}\n\n{table(rows)}\n" + (
        "" if batch is None else f"\n{masks_text(batch, setup.index.name, config.grid)}\n"
    )


def _first_batch(setup: Setup) -> Batch | None:
    """The next micro-batch of the run; None where all steps are done.

    Raises:
        ConfigError: on all ranks, where one of them cannot load its own.
    """
    if setup.first_step == setup.length.total_steps:
        return None
    batch, failed = None, None
    try:
        batch = next(setup.loader)
    except DataError as error:
        failed = str(error)
    told = [text for text in setup.plan.ranks.gather(failed) if text]
    if told:
        raise ConfigError(told[0])
    return batch


def _parameters(engine: Engine) -> str:
    parts: dict[str, int] = {}
    for name, parameter in engine.module.jepa.named_parameters():
        if parameter.requires_grad:
            part, size = name.split(".")[0], getattr(parameter, "ds_numel", parameter.numel())
            parts[part] = parts.get(part, 0) + size
    told = [f"{part.replace('_', ' ')} {n / 1e6:.2f} M" for part, n in parts.items()]
    return f"{', '.join(told)}; the target encoder is one more encoder, and is not trained"


def _memory(setup: Setup, free: float) -> str:
    """What a step is predicted to need on each rank, beside what is free there."""
    plan = setup.plan
    config, sizes = _planned(plan.config), plan.sizes
    zero = planning.zero_settings(plan.ds, plan.ranks.device.type)
    states = sum(planning.state_bytes(planning.network(config), zero, sizes.world).values())
    shape = planning.largest(planning.drawn_shapes(config, sizes))
    peak = planning.peak_bytes(
        config, shape, sizes.micro, zero, sizes.world, config.model.checkpoint_blocks
    )
    text = (
        f"{_size(peak)} a rank, predicted ({_size(states)} of weights, gradients, moments and "
        f"ZeRO's buckets, the rest for the micro-batch); {_size(free)} free"
    )
    if plan.config.mask.ragged:
        text += "; longer contexts, of mask.ragged, take more"
    if peak > free:
        text += ": it may not fit (docs/trouble.md, Out of memory)"
    return text


def _planned(config: Config) -> Config:
    """What can be predicted: contexts of one length."""
    return config.model_copy(update={"mask": config.mask.model_copy(update={"ragged": False})})


def _disk(setup: Setup) -> str:
    """Size and number of the checkpoints, beside what is free where they will be."""
    config = setup.plan.config
    net = planning.network(config)
    size = 12 * net.trained_parameters + 4 * net.target_parameters
    kept = config.run.keep_checkpoints + 1  # the next one is whole before the oldest goes
    free = shutil.disk_usage(existing_part(run_dir(config))).free
    text = f"{_size(size)} each, at most {kept} at a time"
    if config.run.keep_every:
        text += f" and those of every {config.run.keep_every} steps"
    text += f"; {_size(free)} free"
    return text if kept * size <= free else f"{text}: they will not fit"


def _batch(setup: Setup, batch: Batch | None) -> dict[str, str]:
    if batch is None:
        return {"micro-batch": "none, all steps are done"}
    masks, counts = batch.masks, ""
    if masks.context_lengths is not None:
        counts = f" ({min(masks.context_lengths.counts)} to {max(masks.context_lengths.counts)})"
    shapes = (
        f"images {_shape(batch.images)} ({str(batch.images.dtype).removeprefix('torch.')}), "
        f"context {_shape(masks.context_idx)}{counts}, targets {_shape(masks.target_idx)}"
    )
    if batch.noise is not None:
        shapes += f", sigma {_shape(batch.noise.sigma)}"
    return {"micro-batch": shapes, "first pass": _try(setup, batch)}


def _try(setup: Setup, batch: Batch) -> str:
    """Forward and backward of the batch, where that takes no more than seconds."""
    plan, engine = setup.plan, setup.engine
    device = plan.ranks.device
    work = sum(f.total for f in planning.mean_flops(_planned(plan.config), plan.sizes).values())
    if plan.compilation.name != "off":
        return "not tried, it would compile first"
    if device.type != "cuda" and work > _TRIED:
        return f"not tried, {work / 1e12:.1f} TFLOP on a CPU"
    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with plan.attention.ordered():
            loss, _ = engine.forward(batch, setup.state.encode(batch.images))
            engine.backward(loss)
        found = loss.item()
    except torch.OutOfMemoryError as error:
        text = (
            f"forward and backward of {plan.sizes.micro} images do not fit into the GPU of rank "
            f"{plan.ranks.rank}; lower train_micro_batch_size_per_gpu, or set "
            f"model.checkpoint_blocks=true (docs/trouble.md, Out of memory): {error}"
        )
        if not plan.ranks.main:  # the others wait for this one: only it can say so
            log.error(text)
        raise ConfigError(text) from None
    text = f"loss {found:.4f}, forward and backward in {time.perf_counter() - began:.1f} s"
    if device.type == "cuda":
        peak = max(plan.ranks.gather(torch.cuda.max_memory_allocated(device)))
        text += f", {_size(peak)} of GPU memory at most, before AdamW's moments exist"
    if not math.isfinite(found):
        text += " (docs/trouble.md, The loss is NaN or infinite)"
    return text


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(str(n) for n in tensor.shape)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
