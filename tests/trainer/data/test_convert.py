"""``njepa convert``: the same images, bytes and labels in a form that ``data.path`` takes."""

import errno
import gzip
import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from njepa import cli
from njepa.config import ConfigError
from njepa.data import convert as converting
from njepa.data.convert import convert
from njepa.data.decode import decode
from njepa.data.errors import SourceError
from njepa.data.sources import open_source
from tests.support.pictures import class_folders, encoded, picture, write

JPEG = encoded(picture(0))


def opened(path, tmp_path):
    return open_source(path, tmp_path / "cache", progress=False)


def contents(index):
    label = lambda i: None if index.labels is None else index.classes[index.labels[i]]  # noqa: E731
    return [(index.read(i), label(i)) for i in range(index.n)]


def converted(path, out, **options):
    return convert(path, out, progress=False, **options)


def refused(path, out, **options):
    """The message; nothing may be left of ``out``."""
    with pytest.raises(ConfigError) as caught:
        converted(path, out, **options)
    assert not out.exists()
    assert not list(out.parent.glob(".*.partial"))
    return str(caught.value)


@pytest.mark.parametrize("to", ["shards", "folders"])
def test_bytes_and_labels_are_copied(tmp_path, to):
    root = class_folders(tmp_path / "in", 9)
    grey = encoded(picture(4).convert("L"), "PNG")
    write(root, {"c1/png.jpg": encoded(picture(3), "PNG"), "c0/grey.png": grey})
    write(root, {"c0/film.gif": b"GIF", "c2/cut.jpg": JPEG[:40]})
    report = converted(root, tmp_path / "out", to=to, shard_bytes=4000)
    before, after = opened(root, tmp_path), opened(tmp_path / "out", tmp_path)
    assert sorted(contents(after)) == sorted(contents(before))
    assert (report.images, report.classes) == (11, 3)
    assert len(report.left_out) == 2
    assert report.left_out[0].startswith("c0/film.gif (no image: ends in '.gif')")
    assert "left out 2:\n  c0/film.gif" in str(report)
    if to == "shards":  # also the order; PNG under the name of what it is
        assert contents(after) == contents(before)
        assert report.files == len(after.shards) > 1
        assert sum(name.endswith(".png") for name in after.names) == 2
    else:
        assert sorted(os.listdir(tmp_path / "out")) == ["c0", "c1", "c2"]
    assert not list(tmp_path.glob(".*"))


def test_shards_are_the_same_bytes_every_time(tmp_path):
    root = class_folders(tmp_path / "in", 6)
    for name in ("a", "b"):
        converted(root, tmp_path / name)
    a, b = (tmp_path / name / "shard-000000.tar" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    images = [encoded(picture(i), "PNG" if i % 2 else "JPEG") for i in range(6)]
    path = tmp_path / "a.parquet"
    gif = encoded(picture(0).convert("P"), "GIF")
    labels = ["x/y", "z", "x/y", "z", "x/y", "z", "z"]
    pq.write_table(pa.table({"image": [*images, gif], "label": labels}), path)
    converted(path, tmp_path / "out")
    assert contents(opened(tmp_path / "out", tmp_path)) == list(zip(images, labels, strict=False))
    report = converted(path, tmp_path / "folders", to="folders")
    assert sorted(os.listdir(tmp_path / "folders")) == ["x_y", "z"]
    assert report.left_out[0].startswith("a.parquet/6 (GIF, which has none of the extensions")


# Idx files


def idx(folder, n=5, packed=True, **change):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 28, 20), dtype=np.uint8)
    labels = bytes(k % 3 for k in range(n))
    images = struct.pack(">4I", change.get("magic", 0x803), n, 28, 20) + pixels.tobytes()
    head = struct.pack(">2I", 0x801, change.get("count", n))
    suffix = ".gz" if packed else ""
    pack = gzip.compress if packed else bytes
    write(folder, {
        f"t10k-images-idx3-ubyte{suffix}": pack(images + change.get("more", b"")),
        f"t10k-labels-idx1-ubyte{suffix}": pack(head + labels),
    })  # fmt: skip
    return folder / f"t10k-images-idx3-ubyte{suffix}", pixels


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path, packed):
    path, pixels = idx(tmp_path / "mnist", packed=packed)
    assert converted(path, tmp_path / "out").images == 5
    index = opened(tmp_path / "out", tmp_path)
    assert [index.classes[k] for k in index.labels] == ["0", "1", "2", "0", "1"]
    for i in range(5):  # grey becomes RGB where it is decoded
        assert decode(index.read(i)).equal(torch.from_numpy(pixels[i]).expand(3, -1, -1))


def test_idx_files_that_cannot_be_used(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "mnist"
    path, _ = idx(folder, magic=0x0D03)
    assert "begins with 0x00000d03, expected 0x00000803" in refused(path, out)
    path, _ = idx(folder)
    labels = folder / "t10k-labels-idx1-ubyte.gz"
    assert "(that of labels: give the file of the images)" in refused(labels, out)
    assert f"name the one of the images: {path}" in refused(folder, out)
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(whole[:-1])
    assert "ends within image 4 of 5" in refused(path, out)
    path.write_bytes(whole[:9])
    assert "has 9 bytes, expected the header of an idx file, 16" in refused(path, out)
    path.write_bytes(gzip.compress(whole)[:-300])
    assert "cannot be unpacked" in refused(path, out)
    path, _ = idx(folder, more=b"x")
    assert "continues after the 5 images" in refused(path, out)
    path, _ = idx(folder, count=4)
    assert "has 5 labels and says 4, expected 5" in refused(path, out)
    path.write_bytes(struct.pack(">4I", 0x803, 5, 1 << 30, 28))
    assert "of 28 x 1073741824 pixels; expected" in refused(path, out)
    labels.unlink()
    path, _ = idx(folder)
    labels.unlink()
    assert "expected t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz" in refused(path, out)


# Zips


def zipped(path, files, link=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return path


def test_a_zip_is_what_its_folder_would_be(tmp_path):
    root = class_folders(tmp_path / "in", 9)
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.jpg")}
    extra = {"train/.DS_Store": b"", "__MACOSX/train/x.jpg": b"", "train/c0/bad.jpg": b"x",
             "train/readme.txt": b""}  # fmt: skip
    path = zipped(tmp_path / "in.zip", {f"train/{n}": data for n, data in files.items()} | extra)
    report = converted(path, tmp_path / "out")
    assert contents(opened(tmp_path / "out", tmp_path)) == contents(opened(root, tmp_path))
    assert report.left_out == [
        "train/c0/bad.jpg (not an image)", "train/readme.txt (no image: ends in '.txt')",
    ]  # fmt: skip
    flat = zipped(tmp_path / "flat.zip", {"a.jpg": JPEG, "b.jpg": JPEG})
    assert converted(flat, tmp_path / "flat").classes == 0


def test_zips_that_are_refused(tmp_path):
    out, path = tmp_path / "out", tmp_path / "x.zip"
    for name in ("../a.jpg", "a/../../b.jpg", "/a.jpg", "C:/a.jpg"):
        message = refused(zipped(path, {"ok.jpg": JPEG, name: JPEG}), out)
        assert f"{name!r}: its name leaves the archive's folder" in message
    assert "'l.jpg': it is a link" in refused(zipped(path, {"ok.jpg": JPEG}, "l.jpg"), out)
    assert "no image among the 1 files" in refused(zipped(path, {"a.txt": b""}), out)
    path.write_bytes(path.read_bytes()[:-10])
    assert "cannot be read as a zip" in refused(path, out)
    zipped(path, {"a.jpg": JPEG, "b.jpg": JPEG})
    path.write_bytes(path.read_bytes().replace(JPEG, JPEG[:-1] + b"x", 1))
    report = converted(path, out)
    assert report.left_out == ["a.jpg (Bad CRC-32 for file 'a.jpg')"]
    assert report.images == 1


# Where it is written


def test_an_existing_target_is_refused(tmp_path):
    root = class_folders(tmp_path / "in", 3)
    with pytest.raises(ConfigError, match=r"in exists, expected a new folder"):
        converted(root, root)
    assert len(list(root.rglob("*.jpg"))) == 3
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="link exists"):
        converted(root, tmp_path / "link")


def test_targets_that_cannot_be_written(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "in", 3)
    message = refused(root, root / "c0/000.jpg/out")
    assert f"cannot be written: File exists: {root / 'c0/000.jpg'}; nothing is left" in message
    out = tmp_path / "out"
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    assert "No space left on device (0 MiB are needed)" in refused(root, out)
    monkeypatch.undo()
    real, calls = converting._add, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(converting, "_add", full)
    assert "No space left on device" in refused(root, out)


def test_classes_that_need_one_folder(tmp_path):
    root = write(tmp_path / "in", {"a.jpg": JPEG, "b.jpg": JPEG})
    (root / "list.txt").write_text("a.jpg\tx/y\nb.jpg\tx_y\n")
    message = refused(root / "list.txt", tmp_path / "out", to="folders")
    assert "'x_y' needs the folder name 'x_y', which another class has" in message
    (root / "list.txt").write_text("a.jpg\t..\nb.jpg\t/etc\n")
    converted(root / "list.txt", tmp_path / "out", to="folders")
    assert sorted(os.listdir(tmp_path / "out")) == ["_.", "_etc"]


def test_nothing_readable(tmp_path):
    path = zipped(tmp_path / "x.zip", {"a.jpg": b"x"})
    with pytest.raises(SourceError, match=r"none of the 1 images .*a\.jpg \(not an image\)"):
        converted(path, tmp_path / "out")
    assert not list(tmp_path.glob(".*.partial"))


def test_the_command(tmp_path, capsys):
    root = class_folders(tmp_path / "in", 3)
    assert cli.main(["convert", str(root), str(tmp_path / "out"), "--shard-size", "0.002"]) == 0
    out = capsys.readouterr().out
    assert f"3 images of 3 classes in 3 files: use data.path={tmp_path / 'out'}" in out
    assert cli.main(["convert", str(root), str(tmp_path / "out")]) == 2
    assert "out exists" in capsys.readouterr().err
    assert cli.main(["convert", str(root), str(tmp_path / "b"), "--shard-size", "nan"]) == 2
    assert "--shard-size must be a number over 0, got nan" in capsys.readouterr().err
