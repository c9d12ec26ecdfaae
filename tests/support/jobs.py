"""Run short trainings in processes of their own and hand back what they did.

    python -m tests.support.jobs JOBS.json OUT.pt     with RANK, WORLD_SIZE, ... in the environment

Every job is {name, overrides, ds, grads, watch, features, moved, reduce, broken, save,
slow_copy}; all jobs of a call share the processes, because starting them costs more than training
does. OUT.pt (rank 0) maps the name to what was recorded.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.support import program_env
from tests.support.broken_steps import Breaking
from tests.support.engine_bytes import EngineBytes
from tests.support.host_reads import watch

TINY = [
    "data.image_size=32", "data.backend=torch", "data.workers=0", "model.encoder=vit_tiny",
    "model.patch_size=4", "model.width=32", "model.depth=2", "model.heads=2",
    "model.predictor={depth: 1, width: 16, heads: 2}", "model.init=xavier", "mask.min_keep=4",
    "optim.warmup_epochs=0", "optim.lr=3e-3", "optim.ema=[0.9, 1.0]",
    "run.max_steps=3", "run.log_every=1", "run.tensorboard=false", "run.progress=false",
    "eval.report=false",
]  # fmt: skip


def make_images(folder: Path, n: int, classes: int = 2) -> None:
    """``n`` JPEGs with structure (waves of random direction and colour) in class folders."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:48, 0:40] / 8.0
    for i in range(n):
        a, b, phase = rng.normal(size=2), rng.uniform(60, 120, 3), rng.uniform(0, 6, 3)
        wave = np.sin(a[0] * x + a[1] * y)[..., None]
        pixels = 128 + b * np.sin(wave * 3 + phase)
        path = folder / f"class{i % classes}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def run_jobs(jobs: list[dict[str, Any]], world: int, folder: Path) -> dict[str, Any]:
    """Run the jobs on ``world`` ranks (gloo, CPU) and return rank 0's records.

    Raises:
        AssertionError: a rank failed; its output is shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(world):
        env = program_env(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
        )  # fmt: skip
        with open(folder / f"rank{rank}.log", "w") as log:
            command = [sys.executable, "-m", "tests.support.jobs"]
            command += [str(folder / "jobs.json"), str(folder / "out.pt")]
            processes.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            )
    codes = [process.wait(timeout=600) for process in processes]
    logs = "\n".join((folder / f"rank{r}.log").read_text()[-4000:] for r in range(world))
    assert codes == [0] * world, logs
    return torch.load(folder / "out.pt", weights_only=True)


def _run(job: dict[str, Any], ranks: Any) -> dict[str, Any]:
    from njepa.config import load_config
    from njepa.config.deepspeed_file import parse_deepspeed
    from njepa.data.errors import DataError
    from njepa.training.health import NonFiniteLoss
    from njepa.training.loop import Loop
    from njepa.training.setup import set_up

    config = load_config("shapes-tiny", TINY + job["overrides"])
    setup = set_up(config, parse_deepspeed(job["ds"]), ranks)
    loop = Loop(setup)
    if job.get("slow_copy"):
        setup.writer._copy = slowly(setup.writer._copy)
    if job.get("save"):  # what was loaded, before anything is trained
        loop._save()
        setup.writer.finish()
    if job.get("watch"):  # instead of a whole run
        watched = watch(loop, steps=2)
        setup.engine.close()
        return watched
    record: dict[str, Any] = {"ids": [], "grads": [], "losses": []}
    engine, scoring = setup.engine.inner, setup.scoring
    breaking = Breaking(job.get("broken"), ranks.rank)
    names = {p: n for n, p in engine.module.named_parameters() if p.requires_grad}
    step, forward = engine.step, engine.forward

    def recording_forward(batch: Any, h: Any) -> Any:
        ids = [torch.empty_like(batch.sample_ids) for _ in range(ranks.world)]
        torch.distributed.all_gather(ids, batch.sample_ids.contiguous())
        record["ids"].append(torch.cat(ids))
        loss, metrics = forward(batch, h)
        loss = breaking.loss(loss)
        shared = loss.detach().clone()
        torch.distributed.all_reduce(shared)
        record["losses"].append(shared.item() / ranks.world)
        return loss, metrics

    def recording_step() -> None:
        if job.get("grads") and engine.is_gradient_accumulation_boundary():
            from deepspeed.utils import safe_get_full_grad

            stage = engine.zero_optimization_stage()
            got = {n: (safe_get_full_grad(p) if stage else p.grad) for p, n in names.items()}
            record["grads"].append({n: g.detach().float().clone() for n, g in got.items()})
        step()

    engine.step, engine.forward = recording_step, recording_forward
    if job.get("reduce"):
        engine.enable_backward_allreduce = True
    if job.get("moved"):
        counted, backward = EngineBytes(), engine.backward

        def counting_backward(loss: Any) -> None:
            with counted:
                backward(loss)
            trained = [p for p in names if engine.zero_optimization_stage() == 0]
            record["moved"] = {
                "moved": dict(counted.moved),
                "reduced": counted.reduced,
                "gradients": sum(4 * getattr(p, "ds_numel", p.numel()) for p in names),
                "without": [names[p] for p in trained if p.grad is None],
            }

        engine.backward = counting_backward
    if job.get("features") and scoring.evaluator is not None:
        features, record["features"] = scoring.evaluator._features, []

        def recording_features(encode: Any) -> Any:
            pair = features(encode)
            record["features"].append(pair[1].clone())
            return pair

        scoring.evaluator._features = recording_features
    if "broken" in job:
        breaking.record(loop, record)
    try:
        loop.run()
    except (NonFiniteLoss, DataError) as error:
        record["error"] = str(error)
    record["step"] = loop.step
    if job.get("features"):
        from deepspeed.utils import safe_get_full_fp32_param

        stage = engine.zero_optimization_stage()
        record["online"] = {
            n: (safe_get_full_fp32_param(p) if stage else p).detach().clone()
            for p, n in names.items()
        }
    target = setup.state.target
    record["state_bytes"] = _state_bytes(engine, target)
    record["target"] = {k: v.clone() for k, v in target.state_dict().items()}
    setup.engine.close()
    return record


def slowly(action: Any) -> Any:
    """The training would be steps ahead, did it not wait."""

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return action(*args)

    return slow


def _state_bytes(engine: Any, target: torch.nn.Module) -> dict[str, int]:
    """What this rank holds between steps."""

    def total(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    inner = optimizer.optimizer if stage else optimizer
    masters = {0: "", 3: "fp32_partitioned_groups_flat"}.get(
        stage, "single_partition_of_fp32_groups"
    )
    state = [x for s in inner.state.values() for x in s.values() if torch.is_tensor(x)]
    return {
        "parameters": total(getattr(p, "ds_tensor", p) for p in engine.module.parameters()),
        "master": total(getattr(optimizer, masters) if stage else []),
        "optimizer": total(state),
        "target": total(target.parameters()),
    }


def main() -> None:
    from njepa.runs.ranks import join_ranks, leave_ranks

    ranks = join_ranks("cpu")
    records = {job["name"]: _run(job, ranks) for job in json.loads(Path(sys.argv[1]).read_text())}
    if ranks.main:
        torch.save(records, sys.argv[2])
    leave_ranks()


if __name__ == "__main__":
    main()
