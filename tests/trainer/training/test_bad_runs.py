"""Whole runs with bad steps: written down, repeated by ``njepa replay``, rolled back, ended."""

from __future__ import annotations

import json

import pytest

from njepa.commands.replay import main as replay
from njepa.config import ConfigError
from njepa.draws.order import SampleOrder
from njepa.draws.streams import seed_of_try
from njepa.runs.dumps import read_dump
from njepa.runs.rollbacks import read_rollbacks, roll_back
from njepa.runs.saving import CheckpointWriter
from tests.support import whole_runs
from tests.support.whole_runs import TRAIN, prepare, python, ranks
from tests.support.written import ALONE, names, save

STEPS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("bad-runs"))


def train(root, name, program, *overrides):
    steps = [f"run.max_steps={STEPS}", "run.checkpoint_every=1", "run.max_bad_steps=2"]
    return whole_runs.train(root, name, program, *steps, *overrides)


def losses(root, name):
    lines = [json.loads(x) for x in (root / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line.get("loss") for line in lines}


#: The samples of the second epoch's first two steps, which no step of another order has.
POISONED = ["-m", "tests.support.poisoned_train", "4,5"]


@pytest.mark.slow
def test_a_run_that_cannot_go_on_says_why_and_its_bad_step_is_repeated(root):
    """Weights that overflow: in any order of the data."""
    ended = train(root, "diverged", TRAIN, "optim.lr=1e25")
    assert ended.returncode == 1, ended.stderr
    assert "not finite in 2 steps in a row up to step 3" in ended.stderr
    assert "went back 1 time already (run.max_rollbacks=1)" in ended.stderr
    assert read_rollbacks(root / "diverged") == [{"from": 3, "to": 1, "salt": 1}]
    dumps = sorted(path.name for path in (root / "diverged/bad").iterdir())
    assert dumps == [f"step-0000000{n}{again}.json" for n in (1, 2) for again in ("-try1", "")]
    for name, salt in (("step-00000002.json", 0), ("step-00000002-try1.json", 1)):
        dump = read_dump(root / "diverged/bad" / name)
        order = SampleOrder(16, 4, 1, 1, 0, seed_of_try(0, salt))
        assert dump.sample_ids == [order.at(2).ids.tolist()]
        assert dump.not_finite_terms == ["loss", "loss_clean", "loss_consistency", "loss_noise"]
        assert "jepa.encoder.blocks.0.attn.qkv.weight" in dump.gradient["not_finite"]
        # Which one: whether that of step 2 was on the disk already.
        assert dump.checkpoint in ("kept/step-00000001", "kept/step-00000002")
    again = python(root, "-m", "njepa.cli", "replay", "diverged/bad/step-00000001.json")
    assert again.returncode == 0, again.stderr
    assert "as then: True" in again.stdout
    assert "first output that is not finite: target.blocks.0.norm1 (its weights" in again.stdout
    assert "bad again" in again.stdout


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_write_one_dump_and_repeat_it(root, stage):
    """With DALI, also after the rollback."""
    ds = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    (root / "two.json").write_text(json.dumps(ds))
    run, two = f"two-{stage}", ranks(2)
    changes = ["--ds_config", "two.json", "optim.lr=1e25", "data.backend=dali"]
    ended = train(root, run, [*two, *TRAIN], *changes)
    assert "not finite in 2 steps in a row up to step 3" in ended.stderr, ended.stderr
    assert read_rollbacks(root / run) == [{"from": 3, "to": 1, "salt": 1}]
    for name, salt in (("step-00000002.json", 0), ("step-00000002-try1.json", 1)):
        dump = read_dump(root / run / "bad" / name)
        order = SampleOrder(16, 2, 1, 2, 0, seed_of_try(0, salt))
        assert dump.sample_ids == [order.at(2).global_ids.tolist()]
        again = python(root, *two, "-m", "njepa.cli", "replay", f"{run}/bad/{name}")
        assert again.returncode == 0, again.stderr
        assert "as then: True" in again.stdout
        assert "bad again" in again.stdout


@pytest.mark.slow
def test_another_order_of_the_data_gets_past_and_a_resume_follows_it(root):
    whole = train(root, "whole", POISONED)
    assert whole.returncode == 0, whole.stderr
    assert "rollback 1 of 1" in whole.stderr
    assert read_rollbacks(root / "whole") == [{"from": 6, "to": 4, "salt": 1}]
    assert list(losses(root, "whole")) == list(range(1, STEPS + 1))
    assert None not in losses(root, "whole").values()
    assert (root / "whole/summary.json").is_file()
    for more in (["run.stop_after=6"], ["run.resume=true"]):
        assert train(root, "cut", POISONED, *more).returncode == 0
    assert losses(root, "cut") == losses(root, "whole")
    # Poison of the loss alone: without it, the same step is finite, which replay says.
    sound = python(root, "-m", "njepa.cli", "replay", "whole/bad/step-00000004.json")
    assert sound.returncode == 1
    assert "this time all was finite" in sound.stdout


def test_no_rollback_leaves_the_order_alone():
    assert seed_of_try(5, 0) == 5
    assert len({seed_of_try(5, salt) for salt in range(4)}) == 4


def test_a_damaged_list_of_rollbacks_is_named(tmp_path):
    (tmp_path / "rollbacks.json").write_text('[{"from": 3}]')
    with pytest.raises(ConfigError, match=r"rollbacks\.json says which order"):
        read_rollbacks(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "is not a dump"), ('{"step": -1}', "not a dump of this")],
)
def test_what_is_no_dump_is_named(tmp_path, text, message):
    path = tmp_path / "bad" / "step-00000001.json"
    if text is not None:
        path.parent.mkdir()
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        replay([str(path)], "njepa replay")


def test_a_step_that_is_abandoned_twice(tmp_path):
    """The second time it takes the place of the first."""
    for salt in (1, 2):
        for step in (2, 4):
            if step == 4 or salt == 1:
                save(tmp_path, step, CheckpointWriter(tmp_path, ALONE, keep=9))
        assert roll_back(tmp_path, 6, 3, limit=2).to == 2
        assert names(tmp_path) == ["step-00000002", "step-00000004.abandoned"]
    assert [entry["salt"] for entry in read_rollbacks(tmp_path)] == [1, 2]
    assert roll_back(tmp_path, 6, 3, limit=2).to is None
