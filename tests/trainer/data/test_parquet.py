"""Parquet in Hugging Face's layout is a source like any other, and bad files get one message."""

import importlib.util
import json
import os
import signal

import numpy as np
import pytest

from njepa.data import parquet
from njepa.data.errors import SourceError
from njepa.data.sources import open_source
from tests.support.loader_case import Case
from tests.support.pictures import encoded, picture, write

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGES = [encoded(picture(i, 40 + i, 30)) for i in range(12)]
NAMES = ["wolf", "crane", "ant", "crane"]


def table(images, labels=None, names=None, column="image", label="label"):
    rows = [None if image is None else {"bytes": image, "path": "../x.jpg"} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {column: pa.array(rows, kind)}
    if labels is not None:
        columns[label] = pa.array(labels)
    made = pa.table(columns)
    if names is None:
        return made
    feature = {label: {"names": names, "_type": "ClassLabel"}}
    return made.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": feature}})}
    )


def save(path, made, rows=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, row_group_size=rows)
    return path


def opened(path, tmp_path):
    return open_source(path, tmp_path / "cache", progress=False)


def refused(path, tmp_path):
    with pytest.raises(SourceError) as caught:
        opened(path, tmp_path)
    return str(caught.value)


@pytest.fixture
def two_files(tmp_path):
    """12 images of 4 classes, two of one name, in two files of three row groups."""
    for k in range(2):
        part = slice(6 * k, 6 * k + 6)
        made = table(IMAGES[part], [i % 4 for i in range(12)][part], NAMES)
        save(tmp_path / f"in/train-0000{k}-of-00002.parquet", made, rows=2)
    return tmp_path / "in"


def test_rows_are_samples(tmp_path, two_files):
    for _ in range(2):  # built, then cached
        index = opened(two_files, tmp_path)
        assert index.n == 12
        assert index.name(0) == "train-00000-of-00002.parquet/0"
        assert index.name(11) == "train-00001-of-00002.parquet/5"
        assert [index.read(i) for i in (7, 0, 11, 5)] == [IMAGES[i] for i in (7, 0, 11, 5)]
        assert index.read(3, limit=10) == IMAGES[3][:10]
        assert index.widths.tolist() == [40 + i for i in range(12)]
        assert index.sizes.tolist() == [len(image) for image in IMAGES]
        assert index.path(0) is None
        assert index.classes == ["ant", "crane (1)", "crane (3)", "wolf"]
        assert [index.classes[k] for k in index.labels[:4]] == [
            "wolf", "crane (1)", "ant", "crane (3)",
        ]  # fmt: skip
    assert opened(two_files / "train-*.parquet", tmp_path).digest == index.digest
    one = opened(two_files / "train-00001-of-00002.parquet", tmp_path)
    assert (one.n, one.read(0)) == (6, IMAGES[6])


def test_layouts(tmp_path):
    cifar = save(tmp_path / "a.parquet", table(IMAGES, [7, 9] * 6, None, "img", "fine_label"))
    assert opened(cifar, tmp_path).classes == ["7", "9"]
    plain = pa.table({"image": pa.array(IMAGES), "label": ["b", "a"] * 6})
    index = opened(save(tmp_path / "b.parquet", plain), tmp_path)
    assert (index.classes, index.read(1)) == (["a", "b"], IMAGES[1])
    bare = opened(save(tmp_path / "c.parquet", table(IMAGES)), tmp_path)
    assert (bare.labels, bare.n) == (None, 12)
    hidden = save(tmp_path / "d.parquet", table(IMAGES, [-1] * 12, NAMES))
    assert opened(hidden, tmp_path).labels is None


def test_rows_without_an_image_are_left_out(tmp_path, caplog):
    images = [*IMAGES[:2], None, b"", b"text", IMAGES[3]]
    index = opened(save(tmp_path / "a.parquet", table(images)), tmp_path)
    assert (index.n, index.read(2)) == (3, IMAGES[3])
    for reason in ("2 (no bytes in the row)", "3 (empty file)", "4 (not an image)"):
        assert f"a.parquet/{reason}" in caplog.text


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_loaders_see_the_same_as_from_files(tmp_path, two_files, backend):
    if backend == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    files = write(tmp_path / "files", {f"{i:02d}.jpg": image for i, image in enumerate(IMAGES)})
    pairs = zip(
        Case(two_files, tmp_path).batches(backend, workers=1),
        Case(files, tmp_path).batches(backend, workers=1),
        strict=True,
    )
    for ours, theirs in pairs:
        assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()
        assert ours.images.equal(theirs.images)


# Reading at random


@pytest.fixture
def decoded(monkeypatch):
    """The row groups that are decoded."""
    groups = []
    real = parquet._batches
    monkeypatch.setattr(parquet, "_batches", lambda *a: (groups.append(a[1]), real(*a))[1])
    return groups


def test_row_groups_are_decoded_once_while_they_fit(tmp_path, decoded, monkeypatch):
    path = save(tmp_path / "a.parquet", table(IMAGES), rows=4)
    index = opened(path, tmp_path)
    assert sorted(decoded) == [0, 1, 2]
    decoded.clear()
    order = np.random.default_rng(0).permutation(12).tolist() * 2
    assert [index.read(i) for i in order] == [IMAGES[i] for i in order]
    assert sorted(decoded) == [0, 1, 2]
    decoded.clear()
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)  # the last one only
    parquet._caches.clear()
    for i in (0, 1, 4, 0):
        assert index.read(i) == IMAGES[i]
    assert decoded == [0, 1, 0]
    assert len(parquet._caches[os.getpid()]._kept) == 1


def test_a_forked_process_has_its_own_cache(tmp_path):
    index = opened(save(tmp_path / "a.parquet", table(IMAGES)), tmp_path)
    index.read(0)
    cache = parquet._caches[os.getpid()]
    with cache._lock:  # as a thread of the parent may hold it
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # ends a child that waits for the lock
            os._exit(0 if index.read(5) == IMAGES[5] else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_large_row_groups_are_refused(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(parquet, "CACHE_BYTES", 2000)
    path = save(tmp_path / "a.parquet", table(IMAGES), rows=6)
    assert opened(path, tmp_path).n == 12
    assert f"njepa convert {path} OUT" in caplog.text
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1000)
    message = refused(save(path, table(IMAGES[:11]), rows=6), tmp_path)
    assert "a.parquet has a row group of 6 images" in message
    assert f"njepa convert {path} OUT" in message


def test_a_file_that_changes_under_a_reader(tmp_path):
    path = save(tmp_path / "a.parquet", table(IMAGES))
    index = opened(path, tmp_path)
    index.read(0)
    save(path, table(IMAGES[6:10]))
    assert index.read(0) == IMAGES[6]  # not from the cache
    with pytest.raises(OSError, match="has 4 rows, row 11 is wanted"):
        index.read(11)
    path.write_bytes(b"PAR1")
    with pytest.raises(OSError, match="cannot be read as a Parquet file"):
        index.read(0)


# Bad input


def test_damaged_files(tmp_path):
    path = save(tmp_path / "a.parquet", table(IMAGES))
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-100], b"x" * 1000):
        path.write_bytes(content)
        message = refused(path, tmp_path)
        assert "a.parquet cannot be read as a Parquet file" in message
        assert "copy it again" in message
    path.write_bytes(whole[:4] + b"\xff" * 3000 + whole[3004:])
    assert "row group 0 cannot be decoded" in refused(path, tmp_path)
    save(path, table([]))
    assert "no row in the 1 Parquet file(s)" in refused(path, tmp_path)


def test_columns_that_do_not_fit(tmp_path):
    path = tmp_path / "a.parquet"
    save(path, pa.table({"text": ["a"], "n": [1]}))
    message = refused(path, tmp_path)
    assert "no image column" in message
    assert "got text: string, n: int64; expected Hugging Face's" in message
    save(path, pa.table({"image": ["a.jpg"]}))
    assert "the column 'image' of" in refused(path, tmp_path)
    save(path, table(IMAGES[:2], [0.5, 1.5]))
    assert "label column 'label'" in refused(path, tmp_path)
    save(path, table(IMAGES[:2], [0, 4], NAMES))
    assert "a.parquet/1 has label 4, but" in refused(path, tmp_path)
    save(path, table(IMAGES[:3], [0, -1, 1], NAMES))
    assert "1 of 3 rows have no label (null or -1), the first is a.parquet/1" in refused(
        path, tmp_path
    )


def test_files_that_do_not_belong_together(tmp_path, two_files):
    save(two_files / "train-00002-of-00002.parquet", table(IMAGES))
    message = refused(two_files, tmp_path)
    assert "differ: train-00000-of-00002.parquet has" in message
    assert "train-00002-of-00002.parquet has the image column 'image' and no label" in message
    save(two_files / "test-00000-of-00001.parquet", table(IMAGES))
    message = refused(two_files, tmp_path)
    assert "several splits: test (1 files), train (3 files)" in message
    write(two_files, {"x.tar": b""})
    assert "4 Parquet files and 1 tar shards" in refused(two_files, tmp_path)
    assert "no file matches" in refused(two_files / "*/*/val-*.parquet", tmp_path)


def test_without_pyarrow(tmp_path, two_files, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pyarrow" else real(name, *a)
    )
    assert "pip install 'njepa[parquet]'" in refused(two_files, tmp_path)
