"""Whole runs whose features look collapsed: warned, a checkpoint kept, stopped, gone on with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from njepa.runs.checkpoint_files import CheckpointFiles
from tests.support import program_env
from tests.support.jobs import TINY, make_images


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("collapsed-runs")
    make_images(path / "images", 16)
    (path / "ds.json").write_text('{"train_batch_size": 4}')
    return path


def train(root, name, *overrides, ranks=1):
    launch = ["-m"]
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.run(
        [
            sys.executable, *launch, "tests.support.collapsed_train", "--ds_config", "ds.json",
            *TINY, "data.path=images", "data.cache_dir=cache", f"run.dir={name}", "run.max_steps=6",
            "run.device=cpu", "run.checkpoint_every=100", *overrides,
        ],
        cwd=root, text=True, capture_output=True, timeout=300,
        env=program_env(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )  # fmt: skip


def files(root, name, kind):
    return sorted(path.name for path in (root / name / kind).glob("*"))


@pytest.mark.slow
def test_a_warning_and_a_checkpoint_that_stays(root):
    ended = train(root, "warned")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("the features collapse") == 1
    assert "collapse at step 3: feature_std 0.01 (2 % of the largest in this run)" in ended.stderr
    assert "rankme 2.0, feature_cosine 0.9999, for 2 log lines" in ended.stderr
    assert "its checkpoint stays in warned/kept/step-00000003" in ended.stderr
    CheckpointFiles(root / "warned/kept/step-00000003").verify()
    assert files(root, "warned", "checkpoints") == ["step-00000003", "step-00000006"]
    assert (root / "warned/summary.json").is_file()


@pytest.mark.slow
@pytest.mark.multirank
def test_a_stop_that_can_be_resumed(root):
    name, ranks = "stopped", 2
    ended = train(root, name, "run.on_collapse=stop", ranks=ranks)
    assert ended.returncode == 1, ended.stderr
    assert "njepa: the features collapse at step 3" in ended.stderr
    assert "run.resume=true run.on_collapse=warn goes on" in ended.stderr
    assert files(root, name, "kept") == files(root, name, "checkpoints") == ["step-00000003"]
    assert not (root / name / "summary.json").exists()
    again = train(root, name, "run.on_collapse=stop", "run.resume=true", ranks=ranks)
    assert again.returncode == 1, again.stderr
    assert "collapse at step 4" in again.stderr
    on = train(root, name, "run.resume=true", "run.on_collapse=off", ranks=ranks)
    assert on.returncode == 0, on.stderr
    assert "the features collapse" not in on.stderr
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
