"""What is left of a bad step when the next line is logged, written down (``njepa.runs.dumps``)."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import njepa
from njepa.runs import checkpoints
from njepa.runs.dumps import Dump, number, write_dump
from njepa.runs.folder import run_dir
from njepa.runs.kept import keep_checkpoint
from njepa.training.health import StepNote
from njepa.training.setup import Setup

log = logging.getLogger(__name__)

#: Of the bad steps between two log lines: the first ones.
EACH_TIME = 3


def dump_bad_steps(setup: Setup, notes: Sequence[StepNote]) -> None:
    """Write down the first few bad steps since the last log line. Collective.

    A dump that cannot be written is a warning: it is the training that counts.
    """
    for note in notes[:EACH_TIME]:
        mine = [
            {name: number(float(value)) for name, value in terms.items()} for terms in note.terms
        ]
        terms = setup.plan.ranks.gather(mine)
        if setup.plan.ranks.main:
            try:
                path = write_dump(run_dir(setup.plan.config), _dump(setup, note, terms))
            except OSError as error:
                log.warning("the bad step %d cannot be written down: %s", note.step + 1, error)
            else:
                if path is not None:
                    log.warning("step %d was bad; repeat it: njepa replay %s", note.step + 1, path)


def _dump(setup: Setup, note: StepNote, terms: list[list[dict[str, float | str]]]) -> Dump:
    plan, index, order = setup.plan, setup.index, setup.order
    first = note.step * order.accumulation
    planned = [order.at(first + j) for j in range(order.accumulation)]
    rates = setup.length.schedules.at(note.step)
    ids = [p.global_ids.tolist() for p in planned]
    kept = _keep(run_dir(plan.config), note.step)
    return Dump(
        njepa=njepa.__version__,
        step=note.step,
        epoch=planned[0].epoch,
        seed=plan.config.run.seed,
        salt=setup.salt,
        ranks=plan.ranks.world,
        micro=order.micro_batch,
        accumulation=order.accumulation,
        zero_stage=setup.engine.stage,
        precision=plan.ds.precision_on(plan.ranks.device.type),
        lr=float(rates.lr),
        weight_decay=float(rates.weight_decay),
        ema=float(rates.momentum),
        sample_ids=ids,
        images=[[index.name(i) for i in row] for row in ids],
        terms=terms,
        not_finite_terms=sorted(
            {k for rank in terms for micro in rank for k, v in micro.items() if isinstance(v, str)}
        ),
        gradient=_gradient(setup, note),
        checkpoint=kept,
        data_digest=index.digest,
        versions=checkpoints.versions(),
        config=plan.config.model_dump(mode="json"),
        ds=json.loads(json.dumps(dict(plan.ds.raw))),
    )


def _keep(run: Path, step: int) -> str | None:
    """A checkpoint at or before ``step`` that stays as long as the dump; None: there is none."""
    for path in reversed(checkpoints.all_checkpoints(run)):
        if checkpoints.checkpoint_step(path) <= step:
            return str(keep_checkpoint(run, path).relative_to(run))
    return None


def _gradient(setup: Setup, note: StepNote) -> dict[str, Any]:
    """Norms by module, and the parameters whose gradients are not finite."""
    if note.norms is None:
        return {
            "why_not": f"under ZeRO {setup.engine.stage} no rank holds a whole gradient; njepa "
            f"replay looks at each"
        }
    named = setup.engine.module.named_parameters()
    names = [name for name, p in named if p.requires_grad]
    norms = note.norms.double()
    found: dict[str, Any] = {"norm": number(float(torch.linalg.vector_norm(norms)))}
    if len(names) != len(norms):
        return found | {"why_not": "some parameters had no gradient in this step"}
    squares: dict[str, float] = defaultdict(float)
    for name, norm in zip(names, norms.tolist(), strict=True):
        squares[module_of(name)] += norm * norm
    bad = [n for n, good in zip(names, norms.isfinite().tolist(), strict=True) if not good]
    by_module = {name: number(square**0.5) for name, square in squares.items()}
    return found | {"by_module": by_module, "not_finite": bad}


def module_of(parameter: str) -> str:
    """``encoder.blocks.0`` of ``encoder.blocks.0.mlp.fc1.weight``: a block, else the owner."""
    parts = parameter.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1])
