"""What the mask sampler promises for any configuration, and where it refuses or gives way."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from njepa.config import ConfigError, MaskConfig
from njepa.draws.masks import MaskSampler, possible_sizes
from njepa.draws.streams import words
from tests.support.mask_draws import GRID, ONE, corners, ids_of, inclusion, sampler
from tests.support.mask_oracle import block_size as oracle_block_size


@settings(derandomize=True, deadline=None)
@given(
    compat=st.sampled_from(["fixed", "upstream"]),
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=24),
    step=st.integers(0, 2**33),
    data=st.data(),
)
def test_placements_depend_on_seed_step_and_id_alone(
    compat: str, ids: list[int], step: int, data: st.DataObject
) -> None:
    masks, batch = sampler(compat), np.array(ids, dtype=np.int64)
    rows = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=24)))
    whole, part = masks(step, batch), masks(step, batch[rows])
    np.testing.assert_array_equal(part.target_idx, whole.target_idx[rows])
    # The number of context patches is the batch's; the shorter choice is inside the longer one.
    for a, b in zip(whole.context_idx[rows], part.context_idx, strict=True):
        short, long = sorted((a, b), key=len)
        assert np.isin(short, long).all()
        if compat == "upstream":
            np.testing.assert_array_equal(short, long[: len(short)])
    order = np.array(data.draw(st.permutations(range(len(ids)))))
    shuffled = masks(step, batch[order])
    np.testing.assert_array_equal(shuffled.context_idx, whole.context_idx[order])
    np.testing.assert_array_equal(shuffled.target_idx, whole.target_idx[order])


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    compat=st.sampled_from(["fixed", "upstream"]),
    rows=st.integers(4, 24),
    columns=st.integers(4, 24),
    targets=st.integers(1, 6),
    scale=st.tuples(st.floats(0.1, 0.3), st.floats(0.1, 0.3)).map(sorted).map(tuple),
    aspect=st.tuples(st.floats(0.5, 2), st.floats(0.5, 2)).map(sorted).map(tuple),
    min_keep=st.integers(0, 12),
    overlap=st.booleans(),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_valid_configuration_gives_valid_masks(
    compat: str, rows: int, columns: int, targets: int, scale: tuple[float, float],
    aspect: tuple[float, float], min_keep: int, overlap: bool, batch: int, seed: int,
) -> None:  # fmt: skip
    config = MaskConfig(
        compat=compat, n_targets=targets, target_scale=scale, aspect_ratio=aspect,
        min_keep=min_keep, allow_overlap=overlap,
    )  # fmt: skip
    grid = (rows, columns)
    try:
        masks = MaskSampler(config, grid, seed)
    except ConfigError:
        # The oracle's rule bounds every block of both modes by the whole area plus rounding.
        smallest = min(
            int(np.prod(oracle_block_size(r / 100, scale, aspect, grid))) for r in range(101)
        )
        assert smallest <= min_keep + max(grid)
        return
    context, target, _ = masks(5, ids_of(3, batch))
    (h, w), _ = masks.block_sizes(5)
    assert context.dtype == target.dtype == np.int64
    assert context.flags.c_contiguous
    assert target.flags.c_contiguous
    assert target.shape == (batch, targets, h * w)
    assert context.shape[0] == batch
    for indices in (context, target):
        assert indices.shape[-1] > min_keep
        assert indices.min() >= 0
        assert indices.max() < rows * columns
        assert (np.diff(indices, axis=-1) > 0).all()
    tops, lefts = target // columns, target % columns
    assert (np.ptp(tops, axis=-1) == h - 1).all()
    assert (np.ptp(lefts, axis=-1) == w - 1).all()
    if not overlap and not masks.overlapped:
        shared = inclusion(context, rows * columns) & inclusion(target, rows * columns)
        assert not shared.any()


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_allow_overlap_keeps_target_patches_in_the_context(compat: str) -> None:
    m = sampler(compat, allow_overlap=True)(0, ids_of(0, 8))
    h, w = sampler(compat, allow_overlap=True).block_sizes(0)[1]
    assert m.context_idx.shape[1] == h * w
    assert (inclusion(m.context_idx, 196) & inclusion(m.target_idx, 196)).any(axis=1).all()


def test_seeds_and_steps_are_unrelated() -> None:
    def tops(seed: int, step: int) -> np.ndarray:
        masks = sampler(seed=seed, target_scale=(0.15, 0.15), aspect_ratio=ONE)
        return corners(masks(step, ids_of(0, 3000)).target_idx, GRID)[0].ravel()

    one = tops(0, 0)
    assert len(np.unique(one)) == 10
    for other in (tops(1, 0), tops(0, 1)):
        table = np.zeros((10, 10))
        np.add.at(table, (one, other), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3
    sizes = [[sampler(seed=seed).block_sizes(step) for step in range(50)] for seed in range(2)]
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_blocks_below_min_keep_raise_with_the_numbers(compat: str) -> None:
    """T9: the published sampler hangs on an 8x8 grid, where target blocks have 3x3 patches."""
    message = (
        r"mask\.target_scale=\[0\.15, 0\.2\] and mask\.aspect_ratio=\[0\.75, 1\.5\] on a grid of "
        r"8x8 .* as small as 3x3 = 9 .* mask\.min_keep=10; set mask\.min_keep to at most 8,"
    )
    with pytest.raises(ConfigError, match=message):
        sampler(compat, (8, 8))
    with pytest.raises(ConfigError, match="3x3 = 9"):
        sampler(compat, (8, 8), min_keep=9)  # the comparison is strict
    sampler(compat, (8, 8), min_keep=8)
    with pytest.raises(ConfigError, match=r"mask\.context_scale=\[0\.05, 0\.06\] on a grid"):
        sampler(compat, context_scale=(0.05, 0.06))
    with pytest.raises(ConfigError, match=r"0x0 = 0 patches.*; raise mask\.target_scale"):
        sampler(compat, (2, 2), min_keep=0)


def test_a_narrow_sliver_of_draws_counts() -> None:
    """The smallest block may come from few draws only; it must still be found."""
    for side in range(6, 30):
        sizes = possible_sizes((0.15, 0.2), (0.75, 1.5), (side, side), (side, side))
        smallest = min(h * w for h, w in sizes)
        with pytest.raises(ConfigError, match=f"= {smallest} patches"):
            sampler(grid=(side, side), min_keep=smallest)


def test_fixed_refuses_targets_that_always_fill_the_context() -> None:
    kw: dict[str, Any] = {"target_scale": (0.9, 0.9), "aspect_ratio": ONE, "min_keep": 30}
    message = r"13x13 patches leaves at most 27 of a 14x14 context .* mask\.min_keep=30; lower"
    with pytest.raises(ConfigError, match=message):
        sampler(context_scale=(1.0, 1.0), **kw)
    sampler(context_scale=(1.0, 1.0), allow_overlap=True, **kw)


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_hopeless_rooms_end_with_overlap_and_say_so_once(
    compat: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty targets leave hardly any patch: constraints are dropped from the last one on."""
    masks = sampler(compat, (8, 8), n_targets=20, min_keep=8)
    with caplog.at_level(logging.WARNING, logger="njepa.draws.masks"):
        drawn = [masks(step, ids_of(step, 64)) for step in range(20)]
    assert masks.overlapped
    assert len(caplog.records) == 1
    assert "min_keep" in caplog.text
    shared_with = np.zeros(20)
    for context, target, _ in drawn:
        assert context.shape[1] > 8
        held = inclusion(context, 64)
        for m in range(20):
            shared_with[m] += (held & inclusion(target[:, m], 64)).any(axis=1).sum()
    assert shared_with[0] == 0
    assert shared_with[19] > 0


def test_fixed_draws_failing_images_again_before_it_overlaps() -> None:
    """Rare failures are fixed by new places, and only the failing images change."""
    tight = {"target_scale": (0.2, 0.25), "min_keep": 11}
    masks = sampler(grid=(8, 8), **tight)
    loose = sampler(grid=(8, 8), target_scale=(0.2, 0.25), min_keep=0)
    changed = images = 0
    for step in range(30):
        ids = ids_of(step, 128)
        m, first = masks(step, ids), loose(step, ids)
        assert not (inclusion(m.context_idx, 64) & inclusion(m.target_idx, 64)).any()
        moved = (m.target_idx != first.target_idx).any(axis=(1, 2))
        free = 64 - inclusion(first.target_idx, 64).sum(axis=1)
        assert (free[moved] <= 11 + 28).all()
        changed, images = changed + moved.sum(), images + len(ids)
    assert not masks.overlapped
    assert 0 < changed < 0.5 * images


def test_constraints_are_dropped_after_exactly_twenty_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A 7x7 context block has one place on 8x8 (upstream), so only a dropped constraint helps."""
    attempts: list[int] = []

    def recorded(*args: Any) -> np.ndarray:
        attempts.append(args[-1])
        return words(*args)

    monkeypatch.setattr("njepa.draws.masks.words", recorded)
    masks = sampler("upstream", (8, 8), n_targets=20, min_keep=8)
    ended: set[int] = set()
    for i in range(60):
        masks(0, np.array([i]))
        ended.add(attempts[-1])
    assert len(ended) > 3
    assert all(last % 20 == 0 for last in ended)


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="at least one sample id"):
        sampler()(0, np.array([], dtype=np.int64))
