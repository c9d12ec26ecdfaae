"""What a person sees who sends the output somewhere else: into a pipe that closes, into a file."""

import io
import os
import re
import socket
import subprocess
import sys

import pytest

from njepa import cli
from njepa.runs import tracking
from njepa.runs.tracking import Tracker
from tests.support import ROOT
from tests.support.jobs import TINY, make_images


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [("info --keys", ""), ("info --keys", "1"), ("train --help", ""), ("--help", "")],
)
def test_a_closed_pipe_ends_a_command_quietly(command: str, unbuffered: str):
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does once it has seen enough
    done = subprocess.run(
        [sys.executable, "-m", "njepa.cli", *command.split()],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},  # an empty value is none
        stdout=writer, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_pipe_for_messages_ends_a_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "njepa.cli", "trian"], stderr=writer)
    os.close(writer)
    assert done.returncode == 141


def test_another_broken_pipe_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    """A process of the loader that died is not a reader that has seen enough."""

    def train(*_: object, **__: object) -> int:
        raise BrokenPipeError("to a worker")

    monkeypatch.setattr("njepa.train.main", train)
    with pytest.raises(BrokenPipeError, match="to a worker"):
        cli.main(["train"])


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(tmp_path, capsys, monkeypatch, stderr: io.StringIO, shown: bool = True) -> str:
    """Steps 1, 10, 20 of 100 at 2 s a step after 60 s for the first; returns what stdout got."""
    clock = iter([60.0, 78.0, 98.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", stderr)
    tracker = Tracker(tmp_path, 0, 100, tensorboard=False, progress=shown)
    for step, loss in ((1, 1.5), (10, 1.25), (20, 1.125)):
        tracker.advance()
        tracker.log(step, {"loss": loss, "images_per_s": 31.6})
        tracker.log(step, {"knn_top1": 50.0})  # an evaluation
    tracker.close()
    return capsys.readouterr().out


def test_progress_off_a_terminal_is_lines(tmp_path, capsys, monkeypatch):
    stderr = io.StringIO()
    assert progress(tmp_path, capsys, monkeypatch, stderr).splitlines() == [
        "step 1 of 100: loss 1.5000, 32 images/s",
        "step 10 of 100: loss 1.2500, 32 images/s, 03:00 left",  # 90 steps of 2 s
        "step 20 of 100: loss 1.1250, 32 images/s, 02:40 left",
    ]
    assert stderr.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar(tmp_path, capsys, monkeypatch):
    stderr = Terminal()
    assert progress(tmp_path, capsys, monkeypatch, stderr) == ""
    assert "\r" in stderr.getvalue()
    assert "3/100" in stderr.getvalue()


@pytest.mark.parametrize("stderr", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_no_progress_is_none(tmp_path, capsys, monkeypatch, stderr: io.StringIO):
    assert progress(tmp_path, capsys, monkeypatch, stderr, shown=False) == ""
    assert stderr.getvalue() == ""


def launcher() -> list[str]:
    """`deepspeed` with the options that `make train` gives it, on a port of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = re.search(r"deepspeed (.*)njepa/train\.py", (ROOT / "Makefile").read_text())
    assert options is not None
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port]
    return [*command, *options[1].split()]


@pytest.mark.multirank
@pytest.mark.parametrize(
    "launched",
    [
        pytest.param(False, id="python"),
        pytest.param(True, id="deepspeed", marks=pytest.mark.slow),
    ],
)
def test_a_run_into_a_file_is_short(tmp_path, launched: bool):
    make_images(tmp_path / "images", 16)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    command = [
        *(launcher() if launched else [sys.executable]), str(ROOT / "njepa/train.py"),
        "--ds_config", str(tmp_path / "ds.json"), *TINY, "run.progress=true", "run.max_steps=12",
        "run.log_every=4", "run.device=cpu", f"data.path={tmp_path}/images",
        f"data.cache_dir={tmp_path}/cache", f"run.dir={tmp_path}/run",
    ]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=env, cwd=tmp_path, stdout=log, stderr=log, timeout=300)
    shown = (tmp_path / "log").read_bytes().decode()
    assert done.returncode == 0, shown
    assert "\r" not in shown
    assert "INFO" not in shown
    steps = re.findall(r"^step (\d+) of 12: loss \d", shown, re.M)
    assert steps == ["1", "4", "8", "12"]
    assert len(shown.splitlines()) < 30
    assert re.search(r"^ *attention  sdpa \(dense masks; xformers: ", shown, re.M)
