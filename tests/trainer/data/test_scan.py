"""``scan``: every image decoded, bad ones named, good ones in a list to train on."""

import pytest

from njepa import cli
from njepa.data.errors import SourceError
from njepa.data.scan import scan
from njepa.data.sources import open_source
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
