"""A whole training on a file system that fills up, is emptied, and fills up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from njepa.runs.checkpoints import all_checkpoints, checkpoint_step, good_checkpoint
from tests.support import ROOT, program_env
from tests.support.jobs import TINY, make_images

pytestmark = [pytest.mark.slow, pytest.mark.multirank]


@pytest.fixture
def disk(tmp_path):
    """4 MB; a checkpoint of the tiny run has about half of one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path):
    """Until nothing fits any more."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_training_on_a_disk_that_fills_up(tmp_path, disk):
    make_images(tmp_path / "images", 16)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    run = disk / "run"
    command = [
        sys.executable, str(ROOT / "njepa/train.py"), "--ds_config", str(tmp_path / "ds.json"),
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
