"""Two ranks write one checkpoint, and agree on one that failed."""

from __future__ import annotations

import errno
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from njepa.runs import checkpoints, saving, snapshot
from njepa.runs.checkpoint_files import CheckpointFiles
from njepa.runs.saving import CheckpointFailed, CheckpointWriter
from tests.support.written import STATE


@dataclass
class Meeting:
    """Collectives of two threads that stand for two ranks."""

    values: list = field(default_factory=lambda: [None, None])
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=20))


@dataclass
class Ranks:
    rank: int
    meeting: Meeting
    world: int = 2
    on_gpu: bool = False

    @property
    def main(self):
        return self.rank == 0

    def gather(self, value):
        self.meeting.barrier.wait()
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        return list(self.meeting.values)

    def on_main(self, action):
        result = error = None
        if self.main:
            try:
                result = action()
            except Exception as caught:
                error = caught
        (result, error), _ = self.gather((result, error))
        if error is not None:
            raise error
        return result


WHOLE = torch.arange(10.0)


def both(action):
    with ThreadPoolExecutor(2) as pool:
        return [future.result(timeout=60) for future in [pool.submit(action, r) for r in (0, 1)]]


@pytest.fixture
def writers(tmp_path):
    meeting = Meeting()
    return [CheckpointWriter(tmp_path, Ranks(rank, meeting), keep=1) for rank in (0, 1)]


def save(writers, step):
    """What each rank is told at the end."""

    def act(rank):
        part = WHOLE[:4] if rank == 0 else WHOLE[4:]
        piece = snapshot.Piece("weight/a", part + step, 4 * rank, (10,))
        writers[rank].save(step, [piece], {"w": torch.ones(2)}, STATE)
        try:
            writers[rank].finish()
        except CheckpointFailed as error:
            return str(error)
        return None

    return both(act)


def test_the_parts_are_one_checkpoint(writers, tmp_path):
    assert save(writers, 3) == [None, None]
    files = CheckpointFiles(checkpoints.latest_checkpoint(tmp_path))
    files.verify()
    assert torch.equal(files.whole("weight/a"), WHOLE + 3)
    assert sorted(p.name for p in files.folder.iterdir()) == [
        "index.json", "shard-00000.safetensors", "shard-00001.safetensors", "state.json",
        "target_encoder.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("notes", [True, False])
def test_one_rank_that_cannot_write(writers, tmp_path, monkeypatch, caplog, notes):
    """``notes``: whether it can still leave word of that."""
    assert save(writers, 1) == [None, None]
    write = snapshot._write

    def full(file, parts):
        if "shard-00001" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        return write(file, parts)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(snapshot, "_write", full)
        if not notes:
            patch.setattr(saving.CheckpointWriter, "_note_failure", lambda *_: None)
        told = save(writers, 2)
    assert told[0] == told[1]
    assert "rank 1: [Errno 28] No space left on device" in told[0]
    assert "step-00000001" in told[0]
    assert len(caplog.records) == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert save(writers, 2) == [None, None]


def test_a_rank_that_is_gone_is_not_waited_for(writers, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_PATIENCE", 0.2)
    assert save(writers, 1) == [None, None]
    monkeypatch.setattr(writers[1], "_work", lambda job: job.wrote.set())

    def act(rank):
        writers[rank].save(2, [], {}, STATE)
        if rank == 0:
            writers[0].close()

    both(act)
    assert checkpoints.latest_checkpoint(tmp_path).name == "step-00000001"
