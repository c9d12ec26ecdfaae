"""A disk that is full, limited, read-only or wrong: one message, and the last good checkpoint."""

from __future__ import annotations

import errno
import logging
import os
import traceback
from pathlib import Path

import pytest
import torch

from njepa.runs import checkpoints, saving, snapshot
from njepa.runs.rollbacks import read_rollbacks, roll_back
from njepa.runs.saving import CheckpointFailed, CheckpointWriter
from tests.support.disks import files_up_to, small_disk
from tests.support.written import ALONE, TARGET, flip, names, save, write_checkpoint


def fails(tmp_path, writer, step, told, caplog):
    """A save that cannot work: a warning, one message at the end, the last good one as it was."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointFailed, match=told) as caught:
        save(tmp_path, step, writer)
    assert f"The last good one is {tmp_path}/checkpoints/step-00000001" in str(caught.value)
    assert "Training goes on, and the next save tries again" in caplog.text
    assert len(caplog.records) == 1
    good = checkpoints.find_checkpoint(tmp_path, ALONE)
    assert float(good.whole("step/a")) == 1


def test_a_full_disk(tmp_path, caplog, monkeypatch):
    """Full at every byte of the way, by a file whose write fails."""
    writer = CheckpointWriter(tmp_path, ALONE, keep=1)
    save(tmp_path, 1, writer)
    write, left = snapshot._write, [0]

    def full(file, parts):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        left[0] -= 1
        return write(file, parts)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_write", full)
        for files in range(5):  # shard, target, state, note, index
            left[0] = files
            fails(tmp_path, writer, 2, "No space left on device.*free space, or", caplog)
            assert names(tmp_path) == ["step-00000001"]  # nothing is left that fills the disk
        left[0] = 5
    save(tmp_path, 2, writer)  # there is room again
    assert names(tmp_path) == ["step-00000002"]


def test_a_limit_on_the_size_of_files(tmp_path, caplog):
    """A real error of the system, in the middle of a file."""
    writer = CheckpointWriter(tmp_path, ALONE, keep=1)
    save(tmp_path, 1, writer)
    with files_up_to(1000):
        fails(tmp_path, writer, 2, r"File too large.*ulimit -f", caplog)


def test_a_rollback_that_cannot_be_written_down_is_none(tmp_path):
    """Without the note a resume would go through the bad steps again."""
    writer = CheckpointWriter(tmp_path, ALONE, keep=9)
    for step in (2, 4):
        save(tmp_path, step, writer)
    with files_up_to(10):
        back = roll_back(tmp_path, 6, 3, limit=1)
    assert back.to is None
    assert "rollbacks.json cannot be written: [Errno 27] File too large" in back.told
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    assert read_rollbacks(tmp_path) == []
    assert roll_back(tmp_path, 6, 3, limit=1).to == 2


def test_lost_permission(tmp_path):
    """In a process of its own, which root gives up its rights in."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.chdir(tmp_path)  # the folders above may be closed to others
            os.chmod(tmp_path, 0o777)
            if os.geteuid() == 0:
                os.setuid(65534)
            run = Path()
            writer = CheckpointWriter(run, ALONE, keep=1)
            save(run, 1, writer)
            (run / "checkpoints").chmod(0o500)
            with pytest.raises(CheckpointFailed, match=r"Permission denied.*give this user write"):
                save(run, 2, writer)
            assert checkpoints.find_checkpoint(run, ALONE).folder.name == "step-00000001"
            (run / "checkpoints").chmod(0o700)
            save(run, 2, writer)
            assert names(run) == ["step-00000002"]
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_full_file_system(tmp_path, caplog):
    """A real one of 256 kB: room for one checkpoint, not for two."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        writer = CheckpointWriter(disk, ALONE, keep=1)
        large = {"weight/b": torch.zeros(35_000)}  # 140 kB

        def save_large(step):
            state = {"step/a": torch.tensor(float(step))}
            write_checkpoint(disk, step, large | state, TARGET, writer)

        save_large(1)
        with caplog.at_level(logging.WARNING), pytest.raises(CheckpointFailed, match="No space le"):
            save_large(2)
        assert len(caplog.records) == 1
        assert names(disk) == ["step-00000001"]
        assert float(checkpoints.find_checkpoint(disk, ALONE).whole("step/a")) == 1
        large["weight/b"] = torch.zeros(5_000)
        save_large(3)
        assert names(disk) == ["step-00000003"]


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "write permission"), (errno.EDQUOT, "quota")],
)
def test_a_disk_that_refuses(tmp_path, caplog, monkeypatch, number, hint):
    writer = CheckpointWriter(tmp_path, ALONE, keep=1)
    save(tmp_path, 1, writer)

    def refuse(*_args, **_kwargs):
        raise OSError(number, os.strerror(number), "checkpoints")

    monkeypatch.setattr(saving.Path, "mkdir", refuse)
    fails(tmp_path, writer, 2, f"{os.strerror(number)}.*{hint}", caplog)


def test_a_disk_that_does_not_hold_what_was_written(tmp_path, caplog, monkeypatch):
    writer = CheckpointWriter(tmp_path, ALONE, keep=1)
    save(tmp_path, 1, writer)
    read_back = snapshot.read_back

    def damaged(path):
        flip(path)
        return read_back(path)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "read_back", damaged)
        fails(tmp_path, writer, 2, "does not hold what was written to it", caplog)
