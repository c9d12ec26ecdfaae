"""Whole runs whose features look collapsed: warned, a checkpoint kept, stopped, gone on with."""

from __future__ import annotations

import json

import pytest

from njepa.runs.checkpoint_files import CheckpointFiles
from tests.support import whole_runs
from tests.support.whole_runs import prepare, ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("collapsed-runs"))


def train(root, name, *overrides, launch=()):
    program = [*launch, "-m", "tests.support.collapsed_train"]
    steps = ["run.max_steps=6", "run.checkpoint_every=100"]
    return whole_runs.train(root, name, program, *steps, *overrides)


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
    name, two = "stopped", ranks(2)
    ended = train(root, name, "run.on_collapse=stop", launch=two)
    assert ended.returncode == 1, ended.stderr
    assert "njepa: the features collapse at step 3" in ended.stderr
    assert "run.resume=true run.on_collapse=warn goes on" in ended.stderr
    assert files(root, name, "kept") == files(root, name, "checkpoints") == ["step-00000003"]
    assert not (root / name / "summary.json").exists()
    again = train(root, name, "run.on_collapse=stop", "run.resume=true", launch=two)
    assert again.returncode == 1, again.stderr
    assert "collapse at step 4" in again.stderr
    on = train(root, name, "run.resume=true", "run.on_collapse=off", launch=two)
    assert on.returncode == 0, on.stderr
    assert "the features collapse" not in on.stderr
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
