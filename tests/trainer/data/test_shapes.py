"""The embedded set: deterministic, complete or absent, and not readable from colours or pixels."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from njepa.data import shapes


@pytest.fixture
def small_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SPLIT_SIZES", {"train": 36, "test": 20})


def _files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.jpg")}


def test_sizes_meet_the_contract() -> None:
    assert shapes.SPLIT_SIZES["train"] >= 8192
    assert shapes.SPLIT_SIZES["test"] >= 2048
    assert 48 <= shapes.IMAGE_SIZE <= 96
    assert 10 <= len(shapes.CLASSES) <= 16


def test_pixels_are_the_ones_of_this_version() -> None:
    """Same pixels on every machine and NumPy: change SET_NAME together with this hash."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for index in range(4 * len(shapes.CLASSES)):
            digest.update(shapes.render(split, index).tobytes())
    assert digest.hexdigest()[:16] == "6a4c81f0486249d1"


def test_render_refuses_what_does_not_exist() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        shapes.render("validation", 0)
    with pytest.raises(ValueError, match=r"index must be in \[0, 8192\), got 8192"):
        shapes.render("train", 8192)


def test_half_is_light_and_no_image_twice() -> None:
    seen = set()
    for index in range(128):
        for split in ("train", "test"):
            image = shapes.render(split, index)
            assert image.shape == (64, 64, 3)
            assert image.dtype == np.uint8
            # tile colours have no brightness (up to rounding and the few clipped pixels)
            light = image.astype(int).sum(-1) > 3 * 128
            assert abs(light.mean() - 0.5) < 0.02, (split, index)
            seen.add(image.tobytes())
    assert len(seen) == 256


def test_classes_look_different() -> None:
    """With colours taken away, the power spectrum alone tells the classes apart."""

    def spectra(split: str, n: int) -> np.ndarray:
        light = np.stack([shapes.render(split, i).mean(-1) - 128 for i in range(n)])
        power = np.sqrt(abs(np.fft.rfft2(light))).reshape(n, -1)
        return power - power.mean(1, keepdims=True)

    classes = len(shapes.CLASSES)
    accuracy = _knn_accuracy(spectra("train", 64 * classes), spectra("test", 16 * classes), classes)
    assert accuracy > 0.5  # chance is 1 in 16


def test_files_labels_and_jpeg(small_set: None, tmp_path: Path) -> None:
    train, test = shapes.ensure_shapes(tmp_path, progress=False)
    assert (train, test) == (tmp_path / "shapes-v1" / "train", tmp_path / "shapes-v1" / "test")
    assert len(_files(train)) == 36
    assert len(_files(test)) == 20
    assert sorted(p.name for p in train.iterdir()) == sorted(shapes.CLASSES)
    for index in (0, 17, 35):
        path = train / shapes.CLASSES[index % len(shapes.CLASSES)] / f"{index:05d}.jpg"
        with Image.open(path) as image:
            assert image.format == "JPEG"
            got = np.asarray(image.convert("RGB")).astype(int)
        assert abs(got - shapes.render("train", index)).mean() < 6  # coding noise only
    leftovers = [p.name for p in tmp_path.iterdir() if p.name not in {"shapes-v1"}]
    assert leftovers == [".shapes-v1.lock"]


def test_complete_set_is_left_alone_and_a_broken_one_mended(
    small_set: None, tmp_path: Path
) -> None:
    train, _ = shapes.ensure_shapes(tmp_path, progress=False)
    before = _files(tmp_path)
    shapes.ensure_shapes(tmp_path, progress=False)
    assert _files(tmp_path) == before

    victim = next(train.rglob("*.jpg"))
    manifest = tmp_path / "shapes-v1" / "manifest.json"
    other_version = manifest.read_text().replace('"fingerprint": "', '"fingerprint": "0')
    for damage in (
        victim.unlink,
        lambda: victim.write_bytes(b""),
        lambda: manifest.write_text("{not json"),
        lambda: manifest.write_text(other_version),
    ):
        damage()
        shapes.ensure_shapes(tmp_path, progress=False)
        assert victim.stat().st_size > 0
        assert _files(tmp_path).keys() == before.keys()
        assert json.loads(manifest.read_text())["fingerprint"] in other_version


def test_an_interrupted_rendering_leaves_no_set(
    small_set: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = shapes.render

    def failing(split: str, index: int) -> np.ndarray:
        if (split, index) == ("test", 5):
            raise KeyboardInterrupt
        return original(split, index)

    monkeypatch.setattr(shapes, "render", failing)
    with pytest.raises(KeyboardInterrupt):
        shapes.ensure_shapes(tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.jpg"))
    monkeypatch.setattr(shapes, "render", original)
    assert len(_files(shapes.ensure_shapes(tmp_path, progress=False)[1])) == 20


def _ensure(cache: Path) -> None:
    shapes.SPLIT_SIZES.update(train=36, test=20)
    shapes.ensure_shapes(cache, progress=False)


def test_several_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_ensure, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(_files(tmp_path)) == 56
    assert len(list(tmp_path.iterdir())) == 2  # the set and its lock


def _knn_accuracy(train: np.ndarray, test: np.ndarray, classes: int, k: int = 20) -> float:
    """Cosine kNN, plain majority; rows in the order of ``class_of``."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    test = test / np.linalg.norm(test, axis=1, keepdims=True)
    nearest = np.argsort(-(test @ train.T), axis=1)[:, :k] % classes
    votes = np.stack([(nearest == c).sum(1) for c in range(classes)], 1)
    return float((votes.argmax(1) == np.arange(len(test)) % classes).mean())


def test_colours_and_pixels_do_not_give_the_label_away() -> None:
    classes = len(shapes.CLASSES)
    train = np.stack([shapes.render("train", i) for i in range(64 * classes)])
    test = np.stack([shapes.render("test", i) for i in range(24 * classes)])

    def colour_histogram(images: np.ndarray) -> np.ndarray:
        bins = (images.astype(np.int64) // 64 * (16, 4, 1)).sum(-1).reshape(len(images), -1)
        return np.stack([np.bincount(b, minlength=64) for b in bins]).astype(np.float32)

    def pixels(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32) - 127.5

    chance = 1 / classes
    spread = 3 * (chance * (1 - chance) / len(test)) ** 0.5  # three standard errors of guessing
    assert _knn_accuracy(colour_histogram(train), colour_histogram(test), classes) < chance + spread
    assert _knn_accuracy(pixels(train), pixels(test), classes) < 0.4
