"""Run folder and tracker: nothing of another run is lost."""

import json
import re

import pytest

from njepa.config import ConfigError, parse_config
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.runs.folder import RunFolder, run_dir
from njepa.runs.tracking import Tracker
from tests.support.disks import files_up_to

FILE = parse_deepspeed({})


def config(folder, **sections):
    run = {"dir": str(folder), **sections.pop("run", {})}
    return parse_config({"run": run, **sections})


def begin(folder, ds=None):
    run = RunFolder(config(folder), parse_deepspeed(ds or {}))
    run.begin()
    run.close()


def test_a_run_is_not_overwritten(tmp_path):
    begin(tmp_path, {"train_batch_size": 1})
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(
        ConfigError, match=r"already holds a run; continue it with run\.resume=true"
    ):
        RunFolder(config(tmp_path, optim={"lr": 1}), FILE)
    assert (tmp_path / "config.yaml").read_text() == before
    assert json.loads((tmp_path / "ds.json").read_text()) == {"train_batch_size": 1}


def test_a_folder_in_use_is_refused(tmp_path):
    first = RunFolder(config(tmp_path), FILE)
    first.begin()
    with pytest.raises(ConfigError, match="is in use by another process"):
        RunFolder(config(tmp_path, run={"resume": True}), FILE)
    first.close()
    RunFolder(config(tmp_path, run={"resume": True}), FILE).close()


def test_resume_refuses_what_decides_the_result_and_takes_the_rest(tmp_path):
    begin(tmp_path)
    changed = config(tmp_path, run={"resume": True, "seed": 3}, optim={"lr": 5.0})
    with pytest.raises(ConfigError, match=re.escape("optim.lr: 0.001 -> 5.0")) as caught:
        RunFolder(changed, FILE)
    assert "run.seed: 0 -> 3" in str(caught.value)
    free = config(
        tmp_path, run={"resume": True, "log_every": 3}, data={"workers": 1},
        model={"attention": "sdpa"},
    )  # fmt: skip
    RunFolder(free, FILE).close()


def test_a_set_up_that_failed_leaves_nothing(tmp_path):
    RunFolder(config(tmp_path / "new"), FILE).close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(config(tmp_path), FILE).close()
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(config(tmp_path / "file" / "run"), FILE)


def test_default_folder_carries_the_recipe():
    assert str(run_dir(parse_config({"recipe": "shapes-tiny"}))) == "runs/shapes-tiny"


def test_tracker_drops_lines_after_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 3.0}]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 4')
    tracker = Tracker(tmp_path, 20, 100, tensorboard=False, progress=False)
    tracker.log(30, {"loss": 4.0})
    tracker.close()
    read = [json.loads(x) for x in path.read_text().splitlines()]
    assert read == [*lines[:2], {"step": 30, "loss": 4.0}]


def test_lines_that_the_disk_did_not_take_come_with_the_next(tmp_path, caplog):
    tracker = Tracker(tmp_path, 0, 100, tensorboard=False, progress=False)
    tracker.log(1, {"loss": 1.0})
    with files_up_to(40):  # half of the second line fits
        for step in (2, 3):
            tracker.log(step, {"loss": 2.0})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
        assert [json.loads(x)["step"] for x in tracker.lines()] == [1, 2, 3]
    assert "the next line will bring this one" in caplog.text
    tracker.log(4, {"loss": 3.0})
    tracker.close()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4]
