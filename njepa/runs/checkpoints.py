"""Checkpoints of a run folder: which there are, which one is good, and going on from it.

``checkpoints/step-00001200/`` is whole or not there (``njepa.runs.saving``). The newest is the one
with the highest number: a pointer beside the names would be a second truth that can differ.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from njepa.config import ConfigError
from njepa.config.deepspeed_file import BatchSizes, fitting_ranks
from njepa.runs.checkpoint_files import (
    INDEX,
    STATE,
    CheckpointFiles,
    DamagedCheckpoint,
)
from njepa.runs.ranks import Ranks

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})$")


class Restored(Protocol):
    """What takes over the tensors of a checkpoint."""

    def restore(self, saved: CheckpointFiles) -> None: ...


def checkpoint_step(path: Path) -> int:
    """Optimizer steps done, from the name of the folder."""
    found = _NAME.match(path.name)
    return int(found[1]) if found else -1


def all_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest last; not verified, and of any layout."""
    root = run / "checkpoints"
    if not root.is_dir():
        return []
    found = [
        path for path in root.iterdir()
        if _NAME.match(path.name) and any((path / name).is_file() for name in (INDEX, STATE))
    ]  # fmt: skip
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, not verified."""
    found = all_checkpoints(run)
    return found[-1] if found else None


def good_checkpoint(run: Path, files: Iterable[str] | None = None) -> CheckpointFiles | None:
    """The newest checkpoint whose checksums are right; None where there is none at all.

    Args:
        files: verified; None: all.

    Raises:
        ConfigError: all are damaged, or the newest good one is of an older version.
    """
    found, damaged = newest_good(run, files)
    if found is None and damaged:
        lines = "\n  ".join(damaged)
        raise ConfigError(
            f"run.dir={run} has no checkpoint that is whole:\n  {lines}\nrestore one from a copy, "
            f"or start a new run in another run.dir"
        )
    return found


def newest_good(
    run: Path, files: Iterable[str] | None = None, up_to: float = math.inf
) -> tuple[CheckpointFiles | None, list[str]]:
    """As ``good_checkpoint``, of those up to step ``up_to``; and what is wrong with newer ones."""
    damaged = list[str]()
    for path in reversed(all_checkpoints(run)):
        if checkpoint_step(path) > up_to:
            continue
        try:
            found = CheckpointFiles(path)
            found.verify(files)
        except DamagedCheckpoint as error:
            log.warning("%s; taking the one before it", error)
            damaged.append(str(error))
        else:
            return found, damaged
    return None, damaged


def set_aside_after(run: Path, step: int, ending: str) -> list[Path]:
    """Give the checkpoints after ``step`` an ending, so that none is taken for the newest."""
    moved = []
    for path in all_checkpoints(run):
        if checkpoint_step(path) > step:
            aside = path.with_name(f"{path.name}{ending}")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            os.rename(path, aside)
            moved.append(aside)
    return moved


def find_checkpoint(run: Path, ranks: Ranks, rename: bool = True) -> CheckpointFiles | None:
    """The good checkpoint that a run goes on from, the same on all ranks. Collective.

    Args:
        rename: damaged ones that are newer get the ending ``.damaged``, because the run will write
            those steps again.
    """

    def find() -> str | None:
        good = good_checkpoint(run)
        if good is None:
            return None
        if rename:
            for aside in set_aside_after(run, checkpoint_step(good.folder), ".damaged"):
                log.warning("%s is renamed to %s; remove it", aside.with_suffix(""), aside.name)
        return str(good.folder)

    found = ranks.on_main(find)
    return None if found is None else CheckpointFiles(Path(found))


def load_checkpoint(
    saved: CheckpointFiles,
    engine: Restored,
    target: nn.Module,
    digest: str,
    sizes: BatchSizes,
    upstream: bool,
) -> dict[str, Any]:
    """Restore engine and target encoder; returns the JSON state. Collective.

    Args:
        upstream: ``mask.compat=upstream``, which cuts contexts by rank.

    Raises:
        ConfigError: data or batch differ from those of the checkpoint.
    """
    state, path = saved.state(), saved.folder
    try:
        was = str(state["data_digest"])
        before = BatchSizes(*(int(state[key]) for key in ("micro", "accumulation", "world")))
        int(state["step"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {STATE}: {error!r}") from None
    if was != digest:
        raise ConfigError(
            f"{path} was written on other data (index digest {was[:12]}, now "
            f"{digest[:12]}): the sample ids would refer to other images; restore the data, or "
            f"start a new run in another run.dir"
        )
    _check_batch(path, before, sizes)
    if before.accumulation != sizes.accumulation:
        log.warning(
            "the accumulation was %d and is %d: each step sees the same images and crops, but "
            "masks, noise and batch statistics belong to the micro-batch and will be others",
            before.accumulation,
            sizes.accumulation,
        )
    elif upstream and before.world != sizes.world:
        log.warning(
            "the run had %d ranks and has %d: with mask.compat=upstream each rank cuts contexts "
            "to a length of its own, so the masks will be others",
            before.world,
            sizes.world,
        )
    engine.restore(saved)
    target.load_state_dict({name: saved.target(name) for name in target.state_dict()})
    return state


def _check_batch(path: Path, before: BatchSizes, now: BatchSizes) -> None:
    if before.total == now.total:
        return
    raise ConfigError(
        f"{path} was written with an effective batch of {before.total} = {before.told}, now it is "
        f"{now.total} = {now.told}: each step would use other images; "
        f"{ways_to_keep(before, now)}"
    )


def ways_to_keep(before: BatchSizes, now: BatchSizes) -> str:
    """How another number of ranks can have the effective batch of ``before``."""
    per_step = before.total // before.accumulation  # masks and noise belong to these images
    fitting, rest = divmod(before.total, now.micro * now.accumulation)
    ways = []
    if not rest:
        ways.append(f"start {_ranks(fitting)} with this DeepSpeed file")
    if per_step % now.world == 0:
        ways.append(
            f"for {_ranks(now.world)} set train_micro_batch_size_per_gpu="
            f"{per_step // now.world} and gradient_accumulation_steps={before.accumulation}"
        )
    ways.append(
        f"with train_batch_size={before.total} and gradient_accumulation_steps="
        f"{before.accumulation} instead of train_micro_batch_size_per_gpu these numbers of ranks "
        f"keep it: {fitting_ranks(per_step)}"
    )
    return "; or ".join(ways)


def _ranks(n: int) -> str:
    return f"{n} rank{'s' if n > 1 else ''}"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, for the JSON state."""
    import deepspeed

    import njepa

    return {
        "njepa": njepa.__version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
