"""Checkpoints are whole or not there; damage is found and named; what comes back is what went."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import threading
import time
import zlib

import pytest
import torch

from njepa.config import ConfigError
from njepa.config.deepspeed_file import BatchSizes
from njepa.data import fork_guard
from njepa.runs import checkpoints, saving, snapshot
from njepa.runs.checkpoint_files import CheckpointFiles, DamagedCheckpoint
from njepa.runs.saving import CheckpointWriter
from tests.support.written import ALONE, TARGET, flip, names, save, write_checkpoint


def test_old_checkpoints_go_when_newer_ones_are_complete(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert checkpoints.latest_checkpoint(tmp_path).name == "step-00000003"


def test_what_cannot_be_removed_is_no_failed_checkpoint(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)

    def refuse(*_args, **_kwargs):
        raise OSError(1, "not permitted")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(saving.CheckpointWriter, "_remove", refuse)
        save(tmp_path, 2, CheckpointWriter(tmp_path, ALONE, keep=1))
    assert "an old checkpoint cannot be removed" in caplog.text
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_keep_every(tmp_path):
    writer = CheckpointWriter(tmp_path, ALONE, keep=1, keep_every=4)
    for step in (2, 4, 6, 8, 10, 11):
        save(tmp_path, step, writer)
    assert names(tmp_path) == ["step-00000004", "step-00000008", "step-00000011"]


def test_what_was_written_comes_back(tmp_path):
    values = {
        "weight/a": torch.randn(4, 5), "weight/b": torch.randn(7).bfloat16(),
        "buffer/n": torch.tensor(3), "step/a": torch.tensor(2.0),
    }  # fmt: skip
    path = write_checkpoint(tmp_path, 7, values, TARGET, shared={"c": "a"})
    files = CheckpointFiles(path)
    files.verify()
    assert files.state()["step"] == 7
    for key, value in values.items():
        assert torch.equal(files.whole(key), value)
        assert files.whole(key).dtype == value.dtype
    assert torch.equal(files.read("weight/a", 3, 9), values["weight/a"].view(-1)[3:12])
    assert torch.equal(files.target("w"), TARGET["w"])
    below = files.below("")
    assert torch.equal(below["c"], values["weight/a"])
    assert sorted(below) == ["a", "b", "c"]


def test_ranges_of_several_ranks_are_one_tensor(tmp_path):
    whole = torch.randn(3, 7)
    parts, shots = whole.view(-1).split([5, 9, 7]), []
    for rank, part in enumerate(parts):
        shot = snapshot.Snapshot()
        start = sum(p.numel() for p in parts[:rank])
        shot.take([snapshot.Piece("weight/a", part, start, (3, 7))])
        shots.append(shot)
    files = {f"s{r}": shot.write(tmp_path / f"s{r}") for r, shot in enumerate(shots)}
    saving.write_index(tmp_path, files, {f"s{r}": s.pieces for r, s in enumerate(shots)})
    read = CheckpointFiles(tmp_path)
    assert torch.equal(read.whole("weight/a"), whole)
    for start, count in ((0, 5), (4, 2), (4, 12), (13, 8), (20, 1)):
        assert torch.equal(
            read.read("weight/a", start, count), whole.view(-1)[start : start + count]
        )
    with pytest.raises(DamagedCheckpoint, match=r"weight/a\[21:22\] is in no file"):
        read.read("weight/a", 15, 7)
    del shots[1]  # what lies between is missing
    saving.write_index(
        tmp_path, files, {n: s.pieces for n, s in zip(("s0", "s2"), shots, strict=True)}
    )
    with pytest.raises(DamagedCheckpoint, match=r"weight/a\[5:21\] is in no file"):
        CheckpointFiles(tmp_path).whole("weight/a")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda p: flip(p / "shard-00000.safetensors"), "shard-00000.safetensors: its checksum is"),
        (lambda p: flip(p / "target_encoder.safetensors", 90), "target_encoder.* its checksum is"),
        (lambda p: flip(p / "state.json"), "state.json: its checksum is"),
        (lambda p: os.truncate(p / "shard-00000.safetensors", 99), "it has 99 bytes, .* were writ"),
        (lambda p: (p / "shard-00000.safetensors").unlink(), "shard-00000.*No such file"),
        (lambda p: os.truncate(p / "index.json", 99), "index.json: .*"),
        (lambda p: (p / "index.json").write_text("[]"), "it holds list, not an object"),
        (lambda p: (p / "index.json").write_text('{"layout": 2}'), "it holds what no index does"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(tmp_path, caplog, harm, told):
    save(tmp_path, 1)
    harm(save(tmp_path, 2))
    with caplog.at_level(logging.WARNING):
        found = checkpoints.find_checkpoint(tmp_path, ALONE)
    assert found.folder.name == "step-00000001"
    assert float(found.whole("step/a")) == 1
    assert re.search(told, caplog.text)
    assert "step-00000002 is damaged" in caplog.text
    # Out of the way: it must not count among those that are kept.
    assert names(tmp_path) == ["step-00000001", "step-00000002.damaged"]
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000002.damaged"]
    harm(tmp_path / "checkpoints" / "step-00000002")  # again
    assert checkpoints.find_checkpoint(tmp_path, ALONE).folder.name == "step-00000001"
    assert names(tmp_path) == ["step-00000001", "step-00000002.damaged"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step) / "shard-00000.safetensors")
    with pytest.raises(ConfigError, match=r"no checkpoint that is whole:\n.*0002.*\n.*0001 is dam"):
        checkpoints.find_checkpoint(tmp_path, ALONE)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_an_unfinished_folder_is_not_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000008.tmp").mkdir()
    assert checkpoints.latest_checkpoint(tmp_path) is None
    assert checkpoints.find_checkpoint(tmp_path, ALONE) is None
    assert checkpoints.latest_checkpoint(tmp_path / "nowhere") is None
    save(tmp_path, 1)  # removes what a killed run left
    assert names(tmp_path) == ["step-00000001", "step-00000009"]


def test_pickles_of_an_older_version_are_refused(tmp_path):
    old = tmp_path / "checkpoints" / "step-00000005"
    old.mkdir(parents=True)
    (old / "state.json").write_text(json.dumps({"step": 5, "versions": {"njepa": "0.0.9"}}))
    (old / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"older njepa \(version 0.0.9\), as DeepSpeed's pickles"):
        checkpoints.find_checkpoint(tmp_path, ALONE)


def test_the_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """Values may change as soon as they are copied, and one checkpoint at most is in work."""
    writer, tensor = CheckpointWriter(tmp_path, ALONE, keep=3), torch.zeros(4)
    gate, write = threading.Event(), snapshot._write

    def held(file, parts):
        gate.wait(10)
        return write(file, parts)

    monkeypatch.setattr(snapshot, "_write", held)

    def begin(step):
        writer.save(step, [snapshot.Piece("weight/a", tensor, 0, (4,))], TARGET, {})

    begin(1)
    writer.await_copy()
    assert not (tmp_path / "checkpoints/step-00000001").exists()
    tensor.fill_(5)
    threading.Timer(0.3, gate.set).start()
    began = time.perf_counter()
    begin(2)  # waits for the first
    assert time.perf_counter() - began > 0.25
    assert torch.equal(
        CheckpointFiles(tmp_path / "checkpoints/step-00000001").whole("weight/a"), torch.zeros(4)
    )
    writer.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(("grace_s", "warnings"), [(60.0, 0), (0.0, 1)])
def test_a_save_that_outlasts_the_grace_of_a_stop_is_told_once(tmp_path, caplog, grace_s, warnings):
    writer = CheckpointWriter(tmp_path, ALONE, keep=3, grace_s=grace_s)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            writer.save(step, [snapshot.Piece("weight/a", torch.zeros(4), 0, (4,))], TARGET, {})
            writer.finish()
    assert len(re.findall(r"step 1 took .* s, more than run.grace_s=0", caplog.text)) == warnings
    assert len(caplog.records) == warnings


def test_processes_can_be_forked_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """Between two chunks: a fork never waits for a whole file."""
    writer, crc32 = CheckpointWriter(tmp_path, ALONE, keep=1), zlib.crc32
    monkeypatch.setattr(snapshot, "_CHUNK", 4000)
    monkeypatch.setattr(
        snapshot.zlib, "crc32", lambda *args: time.sleep(0.02) or crc32(*args)
    )  # 100 chunks, written and read: 4 seconds
    values = torch.zeros(100_000)
    writer.save(1, [snapshot.Piece("weight/a", values, 0, (100_000,))], TARGET, {})
    writer.await_copy()
    began = time.perf_counter()
    for _ in range(3):
        with fork_guard.forking():
            time.sleep(0.01)
    assert time.perf_counter() - began < 2
    assert names(tmp_path) == [".step-00000001.tmp"]
    writer.finish()
    assert names(tmp_path) == ["step-00000001"]


def test_no_process_is_forked_while_a_chunk_is_written():
    held = []

    class File(io.BytesIO):
        def write(self, chunk):
            held.append(fork_guard._at_work)

        def fileno(self):
            return os.dup(2)

    with contextlib.suppress(OSError):  # a terminal cannot be synchronised
        snapshot._write(File(), [memoryview(b"abc"), memoryview(b"d")])
    assert held == [1, 1]


def test_a_run_that_ends_by_an_error_keeps_what_is_in_work(tmp_path):
    writer = CheckpointWriter(tmp_path, ALONE, keep=3)
    writer.save(4, [], TARGET, {})
    writer.close()
    assert names(tmp_path) == ["step-00000004"]
    writer.close()


class Engine:
    def restore(self, saved):
        self.step = float(saved.whole("step/a"))


def load(path, digest="d" * 64, sizes=(8, 1, 1), upstream=False):
    engine, target = Engine(), torch.nn.Module()
    target.w = torch.nn.Parameter(torch.zeros(2, 3))
    files = CheckpointFiles(path)
    state = checkpoints.load_checkpoint(files, engine, target, digest, BatchSizes(*sizes), upstream)
    return engine, target, state


def test_target_and_state_come_back(tmp_path):
    engine, target, state = load(save(tmp_path, 7))
    assert (engine.step, state["step"]) == (7, 7)
    assert torch.equal(target.w, TARGET["w"])


def test_other_data_or_another_batch_is_refused(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(ConfigError, match="written on other data"):
        load(path, "e" * 64)
    with pytest.raises(ConfigError) as caught:
        load(path, sizes=(8, 1, 4))
    text = str(caught.value)
    assert "of 8 = 8 x 1 accumulated x 1 rank, now it is 32 = 8 x 1 accumulated x 4 ra" in text
    assert "start 1 rank with this DeepSpeed file" in text
    assert "for 4 ranks set train_micro_batch_size_per_gpu=2 and gradient_accumulation_steps=1" in (
        text
    )
    assert "these numbers of ranks keep it: 1, 2, 4, 8" in text
    with pytest.raises(ConfigError) as caught:
        load(path, sizes=(5, 1, 3))
    assert "for 3 ranks" not in str(caught.value)
    assert "with this DeepSpeed file" not in str(caught.value)


def test_what_changes_with_the_ranks_is_said(tmp_path, caplog):
    path = save(tmp_path, 1)
    with caplog.at_level(logging.WARNING):
        load(path, sizes=(4, 1, 2))
        assert not caplog.records
        load(path, sizes=(4, 2, 1))
        assert "accumulation was 1 and is 2" in caplog.text
        load(path, sizes=(4, 1, 2), upstream=True)
        assert "mask.compat=upstream" in caplog.text
