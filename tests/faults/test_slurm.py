"""The Slurm script as it stands, under a stand-in scheduler: a requeued job loses nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT, program_env, slurm
from tests.support.jobs import TINY, make_images

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

STEPS = 40


def submit(root, name, **env):
    path = f"{root}/bin:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.run(
        [
            "sbatch", "--wait", "--ntasks=2", str(ROOT / "examples/slurm/requeue.sh"), *TINY,
            "--ds_config", f"{root}/ds.json", f"data.path={root}/images", "data.workers=1",
            f"data.cache_dir={root}/cache", f"run.dir={root}/{name}", f"run.max_steps={STEPS}",
            "run.device=cpu", "run.checkpoint_every=100",
        ],
        env=program_env(PATH=path, STAND_IN=str(root), OMP_NUM_THREADS="1", **env),
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip


def test_a_job_that_is_requeued_ends_as_one_that_is_not(tmp_path):
    slurm.install(tmp_path / "bin")
    make_images(tmp_path / "images", 16)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2}')
    whole = submit(tmp_path, "whole")
    assert whole.returncode == 0, whole.stdout
    cut = submit(tmp_path, "cut", STAND_IN_LIMIT=f"{tmp_path}/cut/metrics.jsonl:3")
    assert cut.returncode == 0, cut.stdout
    assert "SIGUSR1: saving and stopping, in 90 s" in cut.stdout
    assert f"of {STEPS}; the checkpoint is in {tmp_path}/cut; continue" in cut.stdout
    assert cut.stdout.count("stand-in: start") == 1
    losses, weights = [], []
    for name in ("whole", "cut"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        saved = tmp_path / name / f"checkpoints/step-{STEPS:08d}"
        weights.append(load_file(saved / "target_encoder.safetensors"))
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_nothing_is_requeued_that_was_not_asked_to_stop(tmp_path, status):
    slurm.install(tmp_path / "bin")
    (tmp_path / "bin/python").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "bin/python").chmod(0o755)
    done = submit(tmp_path, "run")
    assert done.returncode == status, done.stdout
    assert "stand-in: start" not in done.stdout
