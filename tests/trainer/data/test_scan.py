"""``scan``: every image decoded, bad ones named, good ones in a list to train on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from njepa import cli
from njepa.config import ConfigError
from njepa.data import decode_team
from njepa.data import scan as scan_module
from njepa.data.errors import SourceError
from njepa.data.scan import scan
from njepa.data.sources import open_source
from tests.support import program_env
from tests.support.disks import resize, small_disk
from tests.support.pictures import class_folders, encoded, picture, shard, write

GOOD = encoded(picture(9, 80, 60))


@pytest.fixture
def mixed(tmp_path):
    """150 good images (more than one piece of work), 4 bad ones."""
    root = class_folders(tmp_path / "in", 150)
    bad = {"c0/cut.jpg": GOOD[:-2], "c1/half.jpg": GOOD[: len(GOOD) // 2], "c2/empty.jpg": b"",
           "c2/text.png": b"no image"}  # fmt: skip
    return write(root, bad | {"c1/png.jpg": encoded(picture(2), "PNG")})


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_the_list_of_a_folder_is_a_source(tmp_path, mixed, where):
    out = (mixed if where == "inside" else tmp_path / "lists/new") / "good.txt"
    report = scan(mixed, out, workers=2, progress=False)
    assert (report.good, report.out) == (151, out)
    assert [line.split(" (")[0] for line in report.bad] == [
        "c0/cut.jpg", "c1/half.jpg", "c2/empty.jpg", "c2/text.png",
    ]  # fmt: skip
    listed = open_source(out, tmp_path / "cache", progress=False)
    folder = open_source(mixed, tmp_path / "cache", progress=False)
    assert listed.n == 151
    assert listed.unreadable == []
    assert listed.classes == folder.classes
    bad = {"c0/cut.jpg", "c1/half.jpg"}  # their headers are good: the folder's index has them
    kept = [i for i in range(folder.n) if folder.name(i) not in bad]
    assert [folder.path(i) for i in kept] == [listed.path(i) for i in range(listed.n)]
    assert folder.labels[kept].tolist() == listed.labels.tolist()
    assert out.read_text().splitlines()[0].endswith("c0/000.jpg\tc0")
    text = str(report)
    assert "151 of 155 images are good" in text
    assert "bad: 2 truncated, 1 empty, 1 not an image" in text
    assert "    c1/half.jpg (image file is truncated" in text
    assert f"data.path={out}" in text


def test_scanning_its_own_list_again(tmp_path, mixed):
    out = mixed / "good.txt"
    scan(mixed, out, workers=1, progress=False)
    first = out.read_text()
    report = scan(out, out, workers=1, progress=False)
    assert report.bad == []
    assert out.read_text() == first


def test_shards_are_checked_but_not_listed(tmp_path):
    members = {f"{i}.jpg": encoded(picture(i)) for i in range(4)} | {"4.jpg": GOOD[:-9]}
    path = shard(tmp_path / "a.tar", members)
    report = scan(path, tmp_path / "good.txt", progress=False)
    assert (report.good, report.out) == (4, None)
    assert report.bad[0].startswith("a.tar/4.jpg (")
    assert not (tmp_path / "good.txt").exists()
    assert "a list cannot select images inside tar shards" in str(report)


def test_names_that_a_list_cannot_hold(tmp_path):
    root = write(tmp_path / "in", {"a.jpg": GOOD, "b\tc.jpg": GOOD, "d\ne.jpg": GOOD})
    report = scan(root, tmp_path / "good.txt", progress=False)
    assert report.good == 1
    assert all("a tab or a line break" in line for line in report.bad)


def test_nothing_good(tmp_path):
    root = write(tmp_path / "in", {f"{i}.jpg": GOOD[:-2] for i in range(3)})
    with pytest.raises(SourceError, match=r"no image of .* is readable: 0\.jpg \("):
        scan(root, tmp_path / "good.txt", progress=False)
    with pytest.raises(SourceError, match="does not exist"):
        scan(tmp_path / "nowhere", None)


@pytest.fixture
def decoded(monkeypatch):
    """The samples that scans decode; with ``limit`` an interrupt comes after so many."""

    class Decoded(list):
        limit = None

    seen, faults = Decoded(), scan_module.faults

    def watched(*arguments):
        for sample, fault in faults(*arguments):
            if len(seen) == seen.limit:
                raise KeyboardInterrupt
            seen.append(sample)
            yield sample, fault

    monkeypatch.setattr(scan_module, "faults", watched)
    return seen


def test_an_interrupted_scan_goes_on_where_it_was(tmp_path, mixed, decoded, caplog):
    whole, again = tmp_path / "whole.txt", tmp_path / "again.txt"
    first = scan(mixed, whole, workers=2, progress=False)
    n, journal = len(decoded), tmp_path / ".again.txt.scan"
    decoded.clear()
    decoded.limit = 100  # of 153, in pieces of 64
    with pytest.raises(KeyboardInterrupt):
        scan(mixed, again, workers=1, progress=False)
    assert not again.exists()
    with journal.open("ab") as file:
        file.write(b'[1, [[70, "half a li')
    decoded.clear()
    decoded.limit = None
    second = scan(mixed, again, workers=1, progress=False)
    assert decoded == list(range(64, n))
    assert again.read_text() == whole.read_text()
    assert (second.bad, second.known) == (first.bad, 64)
    assert "(64 of them seen by the scan that was interrupted)" in str(second)
    assert not journal.exists()


def test_a_source_that_has_changed_is_scanned_from_the_start(tmp_path, mixed, decoded):
    decoded.limit = 100
    with pytest.raises(KeyboardInterrupt):
        scan(mixed, tmp_path / "good.txt", workers=1, progress=False)
    (mixed / "c0/cut.jpg").write_bytes(GOOD)
    decoded.clear()
    decoded.limit = None
    report = scan(mixed, tmp_path / "good.txt", workers=1, progress=False)
    assert decoded == list(range(152 + 1))
    assert (report.good, report.known) == (152, 0)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_decoder_that_dies_is_an_image_that_is_named(tmp_path, mixed, monkeypatch, workers):
    index = open_source(mixed, tmp_path / "cache", progress=False)
    ends = {0: signal.SIGSEGV, 63: signal.SIGABRT, 64: signal.SIGKILL, 65: None, index.n - 1: None}
    decode = decode_team.decode_sample

    def dying(index, sample, data):
        if sample in ends:
            os.kill(os.getpid(), ends[sample]) if ends[sample] else os._exit(1)
        return decode(index, sample, data)

    monkeypatch.setattr(decode_team, "decode_sample", dying)
    report = scan(mixed, tmp_path / "good.txt", workers, progress=False)
    named = {f"{index.name(i)} (ends the process that decodes it "
             f"({how.name if how else 'status 1'}))" for i, how in ends.items()}  # fmt: skip
    assert named <= set(report.bad)
    assert report.kinds["crashes the decoder"] == len(ends)
    assert report.good == 151 - len(ends)


def test_a_list_that_cannot_be_written_is_said_before_the_work(tmp_path, mixed, decoded):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*good\.txt cannot be written: .*File exists"):
        scan(mixed, tmp_path / "file/good.txt", progress=False)
    assert decoded == []
    root = write(tmp_path / "bad", {"a.jpg": b"no image"})
    with pytest.raises(SourceError, match="none of the 1 images"):
        scan(root, root / "good.txt", progress=False)
    assert os.listdir(root) == ["a.jpg"]


def test_a_disk_that_is_full_at_the_journal_and_at_the_list(tmp_path, decoded, capsys):
    cut = {f"{i:03d}.jpg": GOOD[:-2] for i in range(128)}  # a long line of the journal for each 64
    root = write(tmp_path / "in", cut | {f"{i:03d}.jpg": GOOD for i in range(128, 150)})
    with small_disk(tmp_path / "disk", "4k") as disk:
        out, journal = disk / "good.txt", disk / ".good.txt.scan"
        command = ["scan", str(root), "--out", str(out), "--workers", "1"]

        def fails(size, told, seen):
            resize(disk, size)
            decoded.clear()
            assert cli.main(command) == 2
            assert capsys.readouterr().err.splitlines()[-1].startswith(f"njepa: {told}")
            assert decoded[:1] == seen[:1]
            assert decoded[-1:] == seen[-1:]
            return os.listdir(disk)

        journal_full = f"scan: {journal} cannot be written: No space left on device; make room"
        assert fails("4k", journal_full, [0, 127]) == [journal.name]
        assert journal.read_bytes().count(b"\n") == 2
        list_full = f"--out {out} cannot be written: No space left on device; make room"
        assert fails("8k", list_full, [64, 149]) == [journal.name]
        assert journal.read_bytes().count(b"\n") == 4
        resize(disk, "64k")
        decoded.clear()
        assert cli.main(command) == 0
        assert decoded == []
        assert len(out.read_text().splitlines()) == 22
        assert not journal.exists()
        (disk / "filler").write_bytes(bytes(1))
        resize(disk, "8k")  # no page for the journal's first line
        assert cli.main(command) == 2
        assert f"--out {out} cannot be written" in capsys.readouterr().err
        assert sorted(os.listdir(disk)) == ["filler", "good.txt"]


def take_interrupts():
    """Whoever starts the tests in the background makes all of their programs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_the_command_is_stopped_three_times_and_loses_nothing(tmp_path):
    root = class_folders(tmp_path / "in", 1500)
    large = tmp_path / "large.jpg"  # or a fast machine is done before the signal comes
    large.write_bytes(encoded(picture(0, 1600, 1200)))
    for path in list(root.rglob("*.jpg")):
        path.unlink()
        path.hardlink_to(large)
    write(root, {"c1/half.jpg": GOOD[: len(GOOD) // 2]})
    command = [sys.executable, "-m", "njepa.cli", "scan", str(root), "--workers", "2"]
    how = {"cwd": tmp_path, "env": program_env(), "text": True, "stderr": subprocess.PIPE}
    journal, lines = tmp_path / ".good.txt.scan", 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(command, **how) as program:
            while not journal.exists() or journal.read_bytes().count(b"\n") < lines + 3:
                assert program.poll() is None
                time.sleep(0.01)
            children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
            workers = children.read_text().split()
            program.send_signal(number)
            _, err = program.communicate()
        assert program.returncode == (130 if number == signal.SIGINT else -number), err
        assert ("the same command goes on" in err) == (number == signal.SIGINT)
        assert "Traceback" not in err
        lines = journal.read_bytes().count(b"\n")
        assert len(workers) == 2
        end = time.monotonic() + 30
        while any(Path("/proc", worker).exists() for worker in workers):
            assert time.monotonic() < end, "its processes live on"
            time.sleep(0.05)
    assert not (tmp_path / "good.txt").exists()
    done = subprocess.run(command, **how, stdout=subprocess.PIPE, check=True)
    seen = re.search(r"1500 of 1501 images are good \((\d+) of them seen by", done.stdout)
    assert int(seen[1]) >= 64 * (lines - 2)  # the head, and perhaps the shorter last piece
    assert len((tmp_path / "good.txt").read_text().splitlines()) == 1500
    assert not journal.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "njepa: data: nowhere does not exist"),
        ([".", "--workers", "0"], "njepa: --workers must be at least 1, got 0"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert cli.main(["scan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_fault_of_ours_is_a_traceback(monkeypatch):
    monkeypatch.setattr("njepa.commands.scan.scan", lambda *_: int("a"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["scan", "."])
