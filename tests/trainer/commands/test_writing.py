"""Files that a command writes: asked before the work, and never half of one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from njepa import cli
from njepa.atomic import write_atomically
from njepa.commands.checks import check_writable
from njepa.config import ConfigError
from tests.support.disks import files_up_to


@pytest.mark.parametrize("content", ["x" * 2000, b"x" * 2000])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, content):
    file = tmp_path / "out.json"
    write_atomically(file, "before")
    with files_up_to(1000), pytest.raises(OSError, match="File too large"):
        write_atomically(file, content)
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["out.json"]
    write_atomically(file, content)
    assert len(file.read_bytes()) == 2000


def test_a_link_and_a_device_stay_what_they_are(tmp_path):
    link, file = tmp_path / "link", tmp_path / "file"
    for target in (file, Path(os.devnull)):
        link.symlink_to(target)
        check_writable("--json", link)
        write_atomically(link, "told")
        assert link.is_symlink()
        link.unlink()
    assert file.read_text() == "told"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable("--json", pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "told")
    assert os.read(reader, 9) == b"told"
    assert pipe.is_fifo()
    os.close(reader)


def test_the_question_leaves_everything_as_it_is(tmp_path):
    file = tmp_path / "out.json"
    check_writable("--json", file)
    assert os.listdir(tmp_path) == []
    file.write_text("before")
    check_writable("--json", file)
    assert (os.listdir(tmp_path), file.read_text()) == (["out.json"], "before")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("/proc/x", r"--json /proc/x cannot be written in /proc: "),  # though access() says yes
        ("nowhere/x", r"--json nowhere/x cannot be written in nowhere: No such file"),
        (".", r"--json \. is a folder"),
    ],
)
def test_what_cannot_be_written_is_refused(file, message):
    with pytest.raises(ConfigError, match=message):
        check_writable("--json", Path(file))


def test_plan_asks_before_the_work(capsys, monkeypatch):
    monkeypatch.setattr("njepa.commands.plan_step._write", None)
    assert cli.main(["plan", "--step", "--json", "/proc/x"]) == 2
    assert "--json /proc/x cannot be written in /proc" in capsys.readouterr().err
