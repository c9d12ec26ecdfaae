"""A whole training on a file system that fills up, is emptied, and fills up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from njepa.runs.checkpoints import all_checkpoints, checkpoint_step, good_checkpoint
from tests.support import program_env
from tests.support.disks import fill, small_disk
from tests.support.jobs import TINY
from tests.support.whole_runs import TRAIN, prepare, train

pytestmark = [pytest.mark.slow, pytest.mark.multirank]


@pytest.fixture
def disk(tmp_path):
    """4 MB; a checkpoint of the tiny run has about half of one."""
    with small_disk(tmp_path / "disk", "4m") as folder:
        yield folder


def test_a_training_on_a_disk_that_fills_up(tmp_path, disk):
    prepare(tmp_path)
    run = disk / "run"
    command = [
        sys.executable, *TRAIN, "--ds_config", str(tmp_path / "ds.json"),
        *TINY, f"data.path={tmp_path}/images", f"data.cache_dir={tmp_path}/cache",
        f"run.dir={run}", "run.max_steps=1000000", "run.checkpoint_every=5", "run.device=cpu",
        "run.log_every=5",
    ]  # fmt: skip
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, env=program_env(OMP_NUM_THREADS="1"), cwd=tmp_path, stdout=file, stderr=file
        )

    def until(condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def newest():
        return max(map(checkpoint_step, all_checkpoints(run)), default=0)

    try:
        until(lambda: newest() >= 5)
        fill(disk / "filler")
        until(lambda: log.read_text().count("could not be written") >= 2)
        before = newest()
        os.unlink(disk / "filler")
        until(lambda: newest() > before)  # the training went on, and saves again
        fill(disk / "filler")
        count = log.read_text().count("could not be written")
        until(lambda: log.read_text().count("could not be written") > count)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 1
    finally:
        process.kill()
    text = log.read_text()
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("njepa: the checkpoint of step")
    assert "No space left on device" in last
    good = good_checkpoint(run)
    assert f"The last good one is {good.folder}" in last
    assert list((run / "checkpoints").glob(".step-*")) == []  # nothing half written


#: ``njepa train`` whose disk is full when the summary is due.
FILLING = """
import sys
from pathlib import Path
from njepa.runs.recorder import Recorder
from njepa.train import main
from tests.support.disks import fill
finish = Recorder.finish
def filling(self, summarise):
    fill(Path(sys.argv[1]))
    return finish(self, summarise)
Recorder.finish = filling
sys.exit(main(sys.argv[2:]))
"""


def test_a_disk_that_is_full_at_the_begin_and_at_the_summary(tmp_path, disk):
    prepare(tmp_path)
    run, filler = disk / "run", disk / "filler"
    fill(filler)
    ended = train(tmp_path, run, TRAIN)
    assert ended.returncode == 2, ended.stderr
    told = f"njepa: run.dir={run} cannot be written: [Errno 28] No space left on device; make room"
    assert ended.stderr.splitlines()[-1].startswith(told)
    assert "Traceback" not in ended.stderr
    assert not run.exists()
    filler.unlink()
    ended = train(tmp_path, run, ["-c", FILLING, str(filler)])
    assert ended.returncode == 1, ended.stderr
    told = f"njepa: {run}/summary.json cannot be written: [Errno 28] No space left on device; make"
    assert ended.stderr.splitlines()[-1].startswith(told)
    assert "Traceback" not in ended.stderr
    assert "in 3 steps" in ended.stdout  # the numbers are seen at least
    assert checkpoint_step(good_checkpoint(run).folder) == 3
    assert not list(run.glob(".*.tmp"))
    filler.unlink()
    ended = train(tmp_path, run, TRAIN, "run.resume=true")
    assert ended.returncode == 0, ended.stderr
    assert (run / "summary.json").is_file()
