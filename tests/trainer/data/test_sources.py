"""Sources: what counts as an image, which label and id it gets, and how the index is cached."""

import io
import logging
import os
import tarfile
import zlib

import pytest
from PIL import Image, ImageOps

from njepa.data.errors import SourceError
from njepa.data.sources import open_source
from tests.support.pictures import class_folders, encoded, picture, shard, special_images, write

JPEG = encoded(picture(0))


def opened(path, tmp_path):
    return open_source(path, tmp_path / "cache", progress=False)


# Folders


def test_nested_folder_without_classes(tmp_path):
    root = write(
        tmp_path / "in",
        {
            "b/deep/er/z.JPG": JPEG, "b/a.jpeg": JPEG, "top.png": encoded(picture(1), "PNG"),
            "notes.txt": b"x", ".hidden.jpg": JPEG, ".git/x.jpg": JPEG, "__MACOSX/y.jpg": JPEG,
            "b/movie.mp4": b"x",
        },
    )  # fmt: skip
    index = opened(root, tmp_path)
    assert index.names == ["b/a.jpeg", "b/deep/er/z.JPG", "top.png"]
    assert (index.n, index.labels, index.classes) == (3, None, [])
    assert index.path(1) == root / "b/deep/er/z.JPG"
    assert index.read(0) == JPEG


def test_class_folders_give_labels(tmp_path):
    index = opened(class_folders(tmp_path / "in", 9), tmp_path)
    assert index.classes == ["c0", "c1", "c2"]
    assert [index.classes[k] for k in index.labels] == [n.split("/")[0] for n in index.names]
    assert index.labels_in(["c2", "c0", "x"]).tolist() == [1] * 3 + [-1] * 3 + [0] * 3
    one_class = opened(class_folders(tmp_path / "one", 3, classes=1), tmp_path)
    assert one_class.labels is None  # nothing to tell apart


def test_numeric_classes_are_in_numeric_order(tmp_path):
    root = write(tmp_path / "in", {f"{k}/x.jpg": JPEG for k in (10, 9, 2)})
    assert opened(root, tmp_path).classes == ["2", "9", "10"]


def test_links_are_followed_and_loops_are_cut(tmp_path):
    root = write(tmp_path / "in", {"a/x.jpg": JPEG})
    elsewhere = write(tmp_path / "elsewhere", {"y.jpg": JPEG})
    (root / "b").symlink_to(elsewhere)
    (root / "a/up").symlink_to(root)
    (root / "a/self").symlink_to(root / "a")
    (root / "a/broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert opened(root, tmp_path).names == ["a/x.jpg", "b/y.jpg"]


def test_sizes_are_those_of_the_upright_image(tmp_path):
    files = special_images()
    index = opened(write(tmp_path / "in", files), tmp_path)
    assert index.n == len(files)
    for i in range(index.n):
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(files[index.name(i)])))
        assert (index.widths[i], index.heights[i]) == upright.size, index.name(i)
        assert index.sizes[i] == len(files[index.name(i)])


def test_names_that_are_not_unicode(tmp_path):
    root = write(tmp_path / "in", {"a.jpg": JPEG})
    (root / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(JPEG)
    (root / "ünïcode 图.jpg").write_bytes(JPEG)
    for _ in range(2):  # built, then cached
        index = opened(root, tmp_path)
        assert index.n == 3
        assert all(index.read(i) == JPEG for i in range(3))


# What cannot be read


def test_unreadable_headers_are_left_out_and_named(tmp_path, caplog):
    root = class_folders(tmp_path / "in", 3)
    write(
        root,
        {"c0/empty.jpg": b"", "c1/text.jpg": b"no image", "c1/cut.jpg": JPEG[:40]}
        | {f"c2/more{k}.jpg": b"x" for k in range(4)},
    )
    for _ in range(2):  # the warning comes with the cached index too
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            index = opened(root, tmp_path)
        assert index.n == 3
        (record,) = caplog.records
        message = record.getMessage()
        assert "left out 7 of 10 images" in message
        assert "c0/empty.jpg (empty file)" in message
        assert "c1/cut.jpg (Truncated File Read)" in message
        assert "c1/text.jpg (not an image)" in message
        assert message.count(".jpg") == 5
        assert message.endswith("; ...")


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(SourceError, match=r"missing/folder does not exist \(the nearest .*\.jpg"):
        opened(tmp_path / "missing/folder", tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SourceError, match=r"no image in the folder .* found no file at all"):
        opened(empty, tmp_path)
    write(empty, {"a.mp4": b"", "b.mp4": b"", "c": b""})
    with pytest.raises(SourceError, match=r"found 2 x \.mp4, 1 x no extension"):
        opened(empty, tmp_path)
    bad = write(tmp_path / "bad", {"a.jpg": b"", "b.jpg": b"text"})
    with pytest.raises(SourceError, match=r"none of the 2 images .*a\.jpg \(empty file\); b\.jpg"):
        opened(bad, tmp_path)
    (tmp_path / "list.txt").write_bytes(b"no\0name.jpg\n")
    with pytest.raises(SourceError, match=r"none of the 1 images"):
        opened(tmp_path / "list.txt", tmp_path)
    with pytest.raises(SourceError, match=r"ends in '\.xyz'"):
        opened(write(tmp_path, {"x.xyz": b""}) / "x.xyz", tmp_path)
    for name, kind in (("x.zip", "a zip"), ("t10k-images-idx3-ubyte.gz", "an idx file")):
        file = write(tmp_path, {name: b""}) / name
        with pytest.raises(SourceError, match=rf"is {kind}.* njepa convert {file} OUT$"):
            opened(file, tmp_path)


# List files


def test_list_file(tmp_path):
    root = class_folders(tmp_path / "in", 6)
    listed = tmp_path / "in/good.txt"
    listed.write_text(f"c1/001.jpg\r\n\n{root}/c0/000.jpg\nc2/002.jpg\nmissing.jpg\n")
    index = opened(listed, tmp_path)
    assert index.names == [f"{root}/c0/000.jpg", "c1/001.jpg", "c2/002.jpg"]
    assert index.labels is None
    assert [index.read(i) for i in range(3)] == [
        (root / name).read_bytes() for name in ("c0/000.jpg", "c1/001.jpg", "c2/002.jpg")
    ]
    assert index.unreadable[0].startswith("missing.jpg (")


def test_list_file_with_labels(tmp_path):
    root = class_folders(tmp_path / "in", 3)
    listed = root / "good.txt"
    listed.write_text("c1/001.jpg\tdog\nc0/000.jpg\tbig cat\nc2/002.jpg\tdog\n")
    index = opened(listed, tmp_path)
    assert (index.classes, index.labels.tolist()) == (["big cat", "dog"], [0, 1, 1])
    listed.write_text("c1/001.jpg\tdog\n\nc0/000.jpg\n")
    with pytest.raises(
        SourceError, match=r"line 3: either every line has a label or none.*'c0/000.jpg'"
    ):
        opened(listed, tmp_path)
    listed.write_text("\n")
    with pytest.raises(SourceError, match="is empty"):
        opened(listed, tmp_path)


# Tar shards


def samples(n, start=0):
    members = {}
    for i in range(start, start + n):
        members[f"{i:04d}.cls"] = str(i % 3 + 5).encode()
        members[f"{i:04d}.JPG" if i % 2 else f"{i:04d}.jpg"] = encoded(picture(i, 40 + i, 30))
        members[f"{i:04d}.json"] = b"{}"
    return members


def test_shards_hold_what_a_folder_would(tmp_path):
    first, second = samples(5), samples(4, start=5)
    shard(tmp_path / "tar/train-000.tar", first)
    shard(tmp_path / "tar/train-001.tar", second)
    index = opened(tmp_path / "tar", tmp_path)
    images = [(k, v) for k, v in (first | second).items() if k.lower().endswith(".jpg")]
    assert index.n == 9
    assert index.names == [f"train-00{i // 5}.tar/{k}" for i, (k, _) in enumerate(images)]
    assert [index.read(i) for i in range(9)] == [v for _, v in images]
    assert index.read(3, limit=100) == images[3][1][:100]
    assert index.widths.tolist() == [40 + i for i in range(9)]
    assert index.classes == ["5", "6", "7"]
    assert index.labels.tolist() == [i % 3 for i in range(9)]
    assert index.path(0) is None
    again = opened(tmp_path / "tar", tmp_path)  # from the cache
    assert again.digest == index.digest
    assert again.read(7) == images[7][1]


def test_ways_to_name_shards(tmp_path):
    for k in range(12):
        shard(tmp_path / f"{'ab'[k % 2]}/t-{k:03d}.tar", samples(1, start=k))
    names = lambda path: opened(tmp_path / path, tmp_path).names  # noqa: E731
    assert names("a/t-002.tar") == ["t-002.tar/0002.jpg"]
    assert names("{a,b}/t-00{2,3}.tar".replace("{a,b}", "a").replace("3", "4")) == [
        "t-002.tar/0002.jpg",
        "t-004.tar/0004.jpg",
    ]
    assert len(names("?/t-00*.tar")) == 10
    assert len(names("*/*.tar")) == 12
    for k in range(12):
        shard(tmp_path / f"c/t-{k}.tar", samples(1, start=k))
    assert len(names("c/t-{0..11}.tar")) == 12
    shard(tmp_path / "d/t-008.tar", samples(1))
    shard(tmp_path / "d/t-009.tar", samples(1))
    shard(tmp_path / "d/t-010.tar", samples(1))
    assert len(names("d/t-{008..010}.tar")) == 3
    with pytest.raises(SourceError, match=r"1 of the 4 tar shards .* the first is .*t-011\.tar"):
        names("d/t-{008..011}.tar")
    with pytest.raises(SourceError, match="no file matches"):
        names("d/x-*.tar")


def test_shards_that_cannot_be_used(tmp_path):
    plain = shard(tmp_path / "a.tar", samples(3))
    packed = tmp_path / "b.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(plain, "x.jpg")
    for path in (packed, write(tmp_path, {"c.tar": packed.read_bytes()}) / "c.tar"):
        with pytest.raises(SourceError, match="Compressed shards are not supported"):
            opened(path, tmp_path)
    cut = write(tmp_path, {"d.tar": plain.read_bytes()[:3000]}) / "d.tar"
    with pytest.raises(SourceError, match=r"d\.tar cannot be read as a tar file .*cut short"):
        opened(cut, tmp_path)
    with pytest.raises(SourceError, match=r"no image in the 1 tar shard"):
        opened(shard(tmp_path / "e.tar", {"a.txt": b"x"}), tmp_path)


def test_large_header_in_a_shard(tmp_path):
    """A header longer than what is read at first: a big ICC profile before the frame header."""
    profile = zlib.compress(os.urandom(150_000))
    data = encoded(picture(0, 50, 30), icc_profile=profile)
    index = opened(shard(tmp_path / "a.tar", {"x.jpg": data}), tmp_path)
    assert (index.widths[0], index.heights[0]) == (50, 30)
