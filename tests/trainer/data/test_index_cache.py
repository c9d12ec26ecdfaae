"""The cached index: used while the source is the same, built again when it is not."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from njepa.data import folders, sources
from njepa.data import index as index_module
from njepa.data.listing import find_source
from njepa.data.sources import open_source
from tests.support.pictures import class_folders, encoded, picture, write

JPEG = encoded(picture(0))


def opened(path, tmp_path):
    return open_source(path, tmp_path / "cache", progress=False)


@pytest.fixture
def builds(monkeypatch):
    """Counts how often an index is really built."""
    calls = []
    real = sources.build_index
    monkeypatch.setattr(sources, "build_index", lambda *a: (calls.append(1), real(*a))[1])
    return calls


def test_the_cache_is_used_until_the_source_changes(tmp_path, builds):
    root = class_folders(tmp_path / "in", 6)
    first = opened(root, tmp_path)
    again = opened(root, tmp_path)
    assert len(builds) == 1
    assert again.names == first.names
    for name in ("widths", "heights", "sizes", "labels"):
        assert np.array_equal(getattr(again, name), getattr(first, name))
    assert (again.digest, again.classes, again.root) == (first.digest, first.classes, first.root)

    def changed(action):
        digest, count = opened(root, tmp_path).digest, len(builds)
        action()
        new = opened(root, tmp_path).digest
        assert len(builds) == count + 1
        return digest != new

    assert changed(lambda: write(root, {"c0/new.jpg": JPEG}))
    assert changed(lambda: (root / "c0/new.jpg").rename(root / "c1/new.jpg"))
    assert changed(lambda: (root / "c1/new.jpg").write_bytes(encoded(picture(1))))
    assert changed(lambda: (root / "c1/new.jpg").unlink())
    assert not changed(lambda: os.utime(root / "c0/000.jpg", (1, 1)))  # touched, same content


def test_unchanged_folders_are_not_listed_again(tmp_path, monkeypatch):
    """Their times say enough, once they are older than the listing by more than a clock's tick."""
    listings = []
    real = sources.find_source
    monkeypatch.setattr(sources, "find_source", lambda *a: (listings.append(1), real(*a))[1])
    monkeypatch.setattr(folders, "_SETTLED", 10**18)
    root = class_folders(tmp_path / "in", 6)
    (root / "list.txt").write_text("c0/000.jpg\nc1/001.jpg\n")
    both = root, root / "list.txt"
    for path in both:  # just made: nothing can be trusted yet
        opened(path, tmp_path)
        opened(path, tmp_path)
    assert len(listings) == 4

    def listed(action=lambda: None):
        """How many of both are listed, and that the second time none is."""
        counts = []
        action()
        for _ in range(2):
            listings.clear()
            for path in both:
                opened(path, tmp_path)
            counts.append(len(listings))
        assert counts[1] == 0
        return counts[0]

    monkeypatch.setattr(folders, "_SETTLED", -(10**18))
    assert listed() == 0
    assert listed(lambda: write(root, {"c0/new.jpg": JPEG})) == 2
    assert opened(root, tmp_path).n == 7
    assert listed(lambda: (root / "c0/new.jpg").rename(root / "c2/new.jpg")) == 2
    assert listed(lambda: (root / "c2/new.jpg").unlink()) == 1  # the list has nothing in c2
    assert listed(lambda: write(root, {"c0/000.jpg": encoded(picture(5), "PNG")})) == 2  # in place
    assert listed(lambda: (root / "list.txt").write_text("c0/000.jpg\n")) == 1
    assert opened(root / "list.txt", tmp_path).n == 1
    write(root, {"c2/bad.jpg": b"x"})
    assert opened(root, tmp_path).unreadable
    listings.clear()
    write(root, {"c2/bad.jpg": JPEG})  # copied again, in place
    assert opened(root, tmp_path).n == 7


def test_only_new_and_changed_files_are_read(tmp_path, monkeypatch):
    """The index is that of a first start, whatever happened in between."""
    read = []
    real = index_module.measure
    monkeypatch.setattr(
        index_module, "measure", lambda file, size: (read.append(file.name), real(file, size))[1]
    )
    root = class_folders(tmp_path / "in", 6)
    write(root, {"c0/bad.jpg": b"x"})
    (tmp_path / "list.txt").write_text("".join(f"in/c{i % 3}/{i:03d}.jpg\n" for i in range(6)))

    def reads(path, *changes):
        opened(path, tmp_path)
        for change in changes:
            change()
        read.clear()
        found, names = opened(path, tmp_path), sorted(read)
        first = index_module.build_index(find_source(path), progress=False)
        assert (found.digest, found.unreadable) == (first.digest, first.unreadable)
        return names

    new = picture(7, 90, 33)
    assert reads(root, lambda: write(root, {"c1/000.jpg": encoded(new)})) == ["000.jpg", "bad.jpg"]
    assert reads(root, (root / "c0/000.jpg").unlink) == ["bad.jpg"]
    assert reads(root, lambda: (root / "c0/003.jpg").rename(root / "c1/x.jpg"),
                 lambda: write(root, {"c2/002.jpg": encoded(new)}),
                 lambda: os.utime(root / "c1/001.jpg", (1, 1))) == [
        "001.jpg", "002.jpg", "bad.jpg", "x.jpg"]  # fmt: skip
    write(root, {"c0/000.jpg": JPEG, "c0/003.jpg": JPEG})
    listed = tmp_path / "list.txt"
    assert reads(listed, lambda: os.utime(root / "c1/004.jpg", (1, 1))) == ["004.jpg"]


def test_a_damaged_cache_is_built_again(tmp_path, builds, caplog):
    root = class_folders(tmp_path / "in", 3)
    opened(root, tmp_path)
    (cached,) = (tmp_path / "cache").glob("*.npz")
    whole = cached.read_bytes()
    for damage in (
        b"",
        b"no zip",
        whole[: len(whole) // 2],
        whole[:200] + b"\0" * 50 + whole[250:],
    ):
        cached.write_bytes(damage)
        count = len(builds)
        assert opened(root, tmp_path).n == 3
        assert len(builds) == count + 1
        assert "will be built again" in caplog.text
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_cache_that_cannot_be_written(tmp_path, caplog):
    root = class_folders(tmp_path / "in", 3)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert opened(root, tmp_path).n == 3
    assert "not cached" in caplog.text


def test_several_processes_at_once_build_once(tmp_path, builds):
    root = class_folders(tmp_path / "in", 30)
    with ThreadPoolExecutor(4) as pool:  # flock excludes open files, threads like processes
        found = list(pool.map(lambda _: opened(root, tmp_path).digest, range(4)))
    assert len(set(found)) == 1
    assert len(builds) == 1


def test_a_folder_of_the_same_name_elsewhere_has_its_own_cache(tmp_path, monkeypatch):
    a = class_folders(tmp_path / "a/in", 3)
    b = class_folders(tmp_path / "b/in", 6)
    assert (opened(a, tmp_path).n, opened(b, tmp_path).n, opened(a, tmp_path).n) == (3, 6, 3)
    monkeypatch.chdir(tmp_path / "a")
    assert opened(Path("in"), tmp_path).digest == opened(a, tmp_path).digest
