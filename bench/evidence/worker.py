"""A process that trains one arm after the other: torch and DeepSpeed are imported once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import traceback
import warnings
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch

from bench.evidence.cache import Task, save
from bench.evidence.tables import RECIPE
from bench.facts import machine
from njepa.config import Config, load_config
from njepa.config.deepspeed_file import load_deepspeed_file
from njepa.data.sources import open_source
from njepa.evaluation.evaluate import Evaluator, open_test_side
from njepa.evaluation.images import LabelledImages
from njepa.models.encoder import build_encoder
from njepa.runs import checkpoints
from njepa.runs.ranks import Ranks, join_ranks, leave_ranks
from njepa.runs.signals import Stopped, StopSignals
from njepa.training.loop import Loop
from njepa.training.setup import set_up

CURVE_POINTS = 25
_CURVES = ("loss", "vicreg_", "feature_std", "rankme")


class _LeanEvaluator(Evaluator):
    """Decodes the images once for the runs of a seed, and leaves the floors to their own task."""

    _kept: ClassVar[tuple[Any, tuple[LabelledImages, LabelledImages]] | None] = None

    def _decoded(self) -> tuple[LabelledImages, LabelledImages]:
        config = self._config
        what = (config.data, config.eval, config.run.seed)
        kept = _LeanEvaluator._kept
        if kept is None or kept[0] != what:
            kept = _LeanEvaluator._kept = (what, super()._decoded())
        return kept[1]

    def floors(self, *networks: Any) -> dict[str, Any]:
        return {}


def run(task: Task, ranks: Ranks, run_dir: Path) -> dict[str, Any]:
    """Train and evaluate one arm under one seed; ``run_dir`` is gone afterwards.

    Raises:
        Stopped: by a signal.
        Exception: whatever the trainer raises.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    config = load_config(RECIPE, task.arguments(run_dir))
    try:
        results = _floors(config, ranks) if task.floors else _train(task, config, ranks, run_dir)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    facts = {**machine(ranks.device), **checkpoints.versions()}
    return {"status": "done", **results, "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": facts}


def _train(task: Task, config: Config, ranks: Ranks, run_dir: Path) -> dict[str, Any]:
    began = time.perf_counter()
    ds_config = run_dir.with_suffix(".ds.json")
    ds_config.write_text(json.dumps(_in_fp32(task.ds)), encoding="utf-8")
    try:
        ds = load_deepspeed_file(ds_config)
    finally:
        ds_config.unlink()
    setup = set_up(config, ds, ranks, evaluator=_LeanEvaluator)
    built = time.perf_counter()
    try:
        with StopSignals(config.run.grace_s) as signals:
            summary = Loop(setup).run(signals)
    finally:
        setup.engine.close()
    assert summary is not None  # this is the only rank, and no run has run.stop_after
    whole = time.perf_counter() - built
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = {k: v for k, v in summary.items() if k.startswith(("knn_", "linear_"))}
    return {
        "scores": scores,
        "feature_std": _short(summary["feature_std"]),
        "rankme": _short(summary["rankme"]),
        "seconds": {
            "set_up": round(built - began, 1),
            "train": summary["seconds"],
            "evaluate": round(whole - summary["seconds"], 1),
        },
        "curve": thin(lines),
    }


def _in_fp32(ds: dict[str, Any]) -> dict[str, Any]:
    """The file with fp32 in the place of "auto", which a CPU may take for bf16."""
    autocast = ds.get("torch_autocast", {})
    if autocast.get("enabled") != "auto":
        return ds
    return {**ds, "torch_autocast": {**autocast, "enabled": False}}


def _floors(config: Config, ranks: Ranks) -> dict[str, Any]:
    began = time.perf_counter()
    train = open_source(config.data.path, config.data.cache_dir, progress=False)
    test = open_test_side(config, train)
    if test is None:
        raise ValueError("the evidence needs labelled test images: set data.eval_path")
    untrained = build_encoder(config).to(ranks.device).eval()
    scores = Evaluator(config, train, test, ranks.device).floors(untrained)
    return {"scores": scores, "seconds": {"evaluate": round(time.perf_counter() - began, 1)}}


def thin(lines: list[dict[str, Any]], points: int = CURVE_POINTS) -> dict[str, list[Any]]:
    """Columns of metrics.jsonl at about ``points`` steps, first and last among them."""
    lines = [line for line in lines if "loss" in line]
    last, wanted = len(lines) - 1, min(points, len(lines))
    picked = [lines[round(i * last / max(1, wanted - 1))] for i in range(wanted)]
    names = [k for k in (picked[0] if picked else {}) if k.startswith(_CURVES)]
    columns = {name: [_short(line.get(name)) for line in picked] for name in names}
    return {"step": [line["step"] for line in picked], **columns}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def serve(pipe: Connection, folder: Path, work: Path, number: int) -> None:
    """Run the tasks that come through ``pipe`` until it closes; results go into ``folder``.

    Answers None for a finished run, else the last line of its error.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / f"worker-{number}.log", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)  # what the trainer prints
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    ranks = join_ranks("cpu")
    try:
        while True:
            try:
                task: Task = pipe.recv()
            except EOFError:
                return
            try:
                save(task, run(task, ranks, work / f"{task.key}-{os.getpid()}"), folder)
                answer = None
            except Stopped:
                return
            except Exception as error:  # the arm failed, the table continues
                traceback.print_exc()
                answer = last_line(error)
            pipe.send(answer)
    finally:
        leave_ranks()


def last_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1].strip()}" if text else type(error).__name__
