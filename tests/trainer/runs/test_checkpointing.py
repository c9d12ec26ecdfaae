"""Checkpoints are whole or not there."""

import json

import pytest
import torch
from torch import nn

from njepa.config import ConfigError
from njepa.runs import checkpoints
from njepa.runs.ranks import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"), None)


class Engine:
    """Writes what DeepSpeed writes, as far as the checkpoint folder is concerned."""

    stage, fail = 0, False

    def save(self, folder):
        path = folder / "mp_rank_00_model_states.pt"
        torch.save({"w": torch.ones(3)}, path)
        if self.fail:
            with open(path, "wb") as file:
                file.write(b"half")

    def load(self, folder):
        self.loaded = folder


def save(run, step, engine=None, keep=2, target=None):
    state = {"data_digest": "d" * 64, "global_batch": 8}
    target = target or nn.Linear(2, 2)
    return checkpoints.save_checkpoint(run, step, engine or Engine(), target, state, ALONE, keep)


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_old_checkpoints_go_when_newer_ones_are_complete(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert checkpoints.latest_checkpoint(tmp_path).name == "step-00000003"


def test_a_broken_write_leaves_the_last_good_one(tmp_path):
    save(tmp_path, 1, keep=1)
    broken = Engine()
    broken.fail = True
    with pytest.raises(OSError, match="not a complete torch file"):
        save(tmp_path, 2, broken, keep=1)
    assert checkpoints.latest_checkpoint(tmp_path).name == "step-00000001"
    save(tmp_path, 2, keep=1)  # what the broken one left is no obstacle
    assert names(tmp_path) == ["step-00000002"]


def test_an_unfinished_folder_is_not_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    assert checkpoints.latest_checkpoint(tmp_path) is None
    assert checkpoints.latest_checkpoint(tmp_path / "nowhere") is None


def test_target_and_state_come_back(tmp_path):
    written, read, engine = nn.Linear(2, 2), nn.Linear(2, 2), Engine()
    path = save(tmp_path, 7, target=written)
    state = checkpoints.load_checkpoint(path, engine, read, ALONE, "d" * 64, 8)
    assert state["step"] == 7
    assert torch.equal(read.weight, written.weight)
    assert engine.loaded.name == "step-00000007"


def test_other_data_or_ranks_are_refused(tmp_path):
    path, engine = save(tmp_path, 1), Engine()
    with pytest.raises(ConfigError, match="written on other data"):
        checkpoints.load_checkpoint(path, engine, nn.Linear(2, 2), ALONE, "e" * 64, 8)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"world": 4}))
    engine.stage = 1
    with pytest.raises(ConfigError, match=r"written by 4 ranks with ZeRO stage 0, now there are 1"):
        checkpoints.load_checkpoint(path, engine, nn.Linear(2, 2), ALONE, "d" * 64, 8)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="effective batch of 8, now it is 16"):
        checkpoints.load_checkpoint(path, Engine(), nn.Linear(2, 2), ALONE, "d" * 64, 16)
