"""Crop windows: the distribution of RandomResizedCrop, always inside, a function of the sample."""

import math
import random

import numpy as np
import pytest

from njepa.draws.crops import crop_windows, flips

SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)


def windows(ids, width, height, seed=0, epoch=0, scale=SCALE, ratio=RATIO):
    ids = np.asarray(ids, dtype=np.int64)
    return crop_windows(
        seed, epoch, ids, np.full(len(ids), width), np.full(len(ids), height), scale, ratio
    )


def one_window(rng: random.Random, width, height, scale, ratio):
    """RandomResizedCrop for one image, written out as its documentation describes it."""
    for _ in range(10):
        target = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize(
    ("width", "height", "scale", "ratio"),
    [
        (64, 64, SCALE, RATIO),
        (500, 333, SCALE, RATIO),
        (300, 40, SCALE, RATIO),  # mostly the central fallback
        (31, 57, (0.05, 0.2), (0.5, 2.0)),
    ],
)
def test_same_distribution_as_the_rule_for_one_image(width, height, scale, ratio):
    n = 4000
    ours = windows(np.arange(n), width, height, scale=scale, ratio=ratio).astype(float)
    rng = random.Random(1)
    theirs = np.array([one_window(rng, width, height, scale, ratio) for _ in range(n)], float)
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        points = np.unique(np.concatenate([a, b]))
        distance = np.abs(
            np.searchsorted(a, points, "right") - np.searchsorted(b, points, "right")
        ).max()
        # Kolmogorov-Smirnov at 1e-5 for two samples of n
        assert distance / n < 2.47 * math.sqrt(2 / n)
    areas = [x[:, 2] * x[:, 3] for x in (ours, theirs)]
    gap = abs(areas[0].mean() - areas[1].mean())
    assert gap < 5 * areas[1].std() * math.sqrt(2 / n) + 1e-9


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (2, 1), (1, 300), (300, 1), (5, 7), (64, 48), (4000, 3)]
)
def test_windows_lie_inside_and_keep_to_scale_and_ratio(width, height):
    left, top, w, h = windows(np.arange(500), width, height).T
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + w <= width).all()
    assert (top + h <= height).all()
    if (width, height) == (64, 48):
        assert ((w / h > 0.7) & (w / h < 1.4)).all()
        assert (w * h / (width * height) > 0.28).all()


def test_every_corner_can_be_reached():
    left, top, w, h = windows(np.arange(3000), 8, 8, scale=(0.2, 0.3)).T
    assert left.min() == top.min() == 0
    assert (left + w).max() == (top + h).max() == 8


def test_a_window_depends_on_seed_epoch_id_and_size_alone():
    ids = np.arange(100)
    base = windows(ids, 64, 48)
    shuffled = np.random.default_rng(0).permutation(100)
    assert np.array_equal(windows(shuffled, 64, 48), base[shuffled])
    assert np.array_equal(windows(ids[37:38], 64, 48)[0], base[37])
    assert (windows(ids, 64, 48, epoch=1) != base).any(axis=1).mean() > 0.9
    assert (windows(ids, 64, 48, seed=1) != base).any(axis=1).mean() > 0.9


def test_whole_image_when_the_crop_is_the_image():
    got = windows(np.arange(50), 40, 40, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert (got == [0, 0, 40, 40]).all()


def test_flips():
    ids = np.arange(20000)
    assert not flips(0, 0, ids, 0.0).any()
    assert flips(0, 0, ids, 1.0).all()
    half = flips(0, 0, ids, 0.5)
    assert abs(half.mean() - 0.5) < 0.02
    assert np.array_equal(flips(0, 0, ids[::-1].copy(), 0.5), half[::-1])
    assert (flips(0, 1, ids, 0.5) != half).mean() > 0.45
