"""The vectorised mask sampler against the per-sample oracle, and its own promises."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from njepa.config import MaskConfig
from njepa.draws.masks import DrawnMasks, MaskSampler, block_size, choose_random, possible_sizes
from njepa.draws.streams import words
from tests.support.mask_oracle import OracleSampler
from tests.support.mask_oracle import block_size as oracle_block_size

GRID = (14, 14)
ONE = (1.0, 1.0)


def sampler(compat: str = "fixed", grid: tuple[int, int] = GRID, seed: int = 0, **kw: Any):
    return MaskSampler(MaskConfig(compat=compat, **kw), grid, seed)


def ids_of(step: int, batch: int) -> np.ndarray:
    return np.arange(step * batch, (step + 1) * batch, dtype=np.int64)


def inclusion(indices: np.ndarray, patches: int) -> np.ndarray:
    """Which patches [G, N] a row of [G, K] or [G, M, K] indices holds."""
    rows = indices.reshape(len(indices), -1)
    held = np.zeros((len(rows), patches), dtype=bool)
    np.put_along_axis(held, rows, True, axis=1)
    return held


def corners(target_idx: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return target_idx[..., 0] // grid[1], target_idx[..., 0] % grid[1]


def same_distribution(a: Any, b: Any, least: int = 8) -> float:
    """p-value of the chi-square test that two samples of categories have one distribution."""
    count_a, count_b = Counter(a), Counter(b)
    table, rest = [], np.zeros(2)
    for key in sorted(count_a.keys() | count_b.keys()):
        cell = np.array([count_a[key], count_b[key]], dtype=float)
        if cell.sum() < 2 * least:
            rest += cell
        else:
            table.append(cell)
    if rest.sum() > 0:
        table.append(rest)
    assert len(table) > 1
    return float(stats.chi2_contingency(np.array(table).T).pvalue)


# Block sizes


@pytest.mark.parametrize(
    ("scale", "aspect"),
    [((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), ONE), ((0.05, 0.9), (0.3, 3.0)), ((0.5, 0.5), ONE)],
)
def test_sizes_follow_the_published_rule(
    scale: tuple[float, float], aspect: tuple[float, float]
) -> None:
    draws = [*np.linspace(0, 1, 250).tolist(), 1 - 2.0**-32]
    grids = [(side, side) for side in range(4, 65)] + [(4, 9), (14, 28), (33, 17)]
    for grid in grids:
        largest = (grid[0] - 1, grid[1] - 1)
        for r in draws:
            expected = oracle_block_size(r, scale, aspect, grid)
            assert block_size(r, scale, aspect, grid, largest) == expected, (grid, r)


def test_fixed_sizes_may_fill_the_grid() -> None:
    """The same rule with the bound at H and W instead of H - 1 and W - 1."""
    for r in np.linspace(0, 1, 101).tolist():
        h, w = block_size(r, (0.85, 1.0), ONE, GRID, GRID)
        area = int(196 * (0.85 + 0.15 * r))
        assert h == w == round(area**0.5)
    assert (h, w) == GRID


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (28, 28), (5, 21)])
@pytest.mark.parametrize(
    ("scale", "aspect"), [((0.15, 0.2), (0.75, 1.5)), ((0.3, 0.9), (0.3, 3.0)), ((0.5, 0.5), ONE)]
)
def test_possible_sizes_are_exactly_those_that_draws_give(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> None:
    largest = (grid[0] - 1, grid[1] - 1)
    draws = np.linspace(0, 1, 20_001).tolist()
    seen = {oracle_block_size(r, scale, aspect, grid) for r in draws}
    found = possible_sizes(scale, aspect, grid, largest)
    assert seen <= found
    # What 20,001 draws can miss is a sliver between two neighbouring sizes.
    assert len(found) <= len(seen) + 2


def test_frequency_of_target_sizes() -> None:
    """Published table for 14x14, and the exact shares from a fine grid of draws."""
    masks = sampler("upstream")
    drawn = Counter(masks.block_sizes(step)[0] for step in range(6000))
    fine = Counter(
        oracle_block_size(r, (0.15, 0.2), (0.75, 1.5), GRID)
        for r in ((i + 0.5) / 40_000 for i in range(40_000))
    )
    shares = {size: count / 40_000 for size, count in fine.items()}
    for size, share in {(5, 6): 0.27, (6, 6): 0.22, (6, 5): 0.13, (7, 5): 0.36}.items():
        assert shares[size] == pytest.approx(share, abs=0.011)
    assert drawn.keys() == shares.keys()
    expected = [6000 * shares[size] for size in drawn]
    assert stats.chisquare([*drawn.values()], expected).pvalue > 1e-3


# Places, lengths and visits, upstream against the oracle


def test_upstream_offsets_are_uniform_without_the_last_one() -> None:
    masks, oracle = sampler("upstream"), OracleSampler(MaskConfig(compat="upstream"), GRID)
    torch.manual_seed(0)
    ours: dict[int, list[tuple[int, int]]] = {}
    theirs: dict[int, list[tuple[int, int]]] = {}
    for step in range(150):
        for target_idx, into in (
            (masks(step, ids_of(step, 64)).target_idx, ours),
            (oracle(16)[1].numpy(), theirs),
        ):
            top, left = corners(target_idx, GRID)
            places = zip(top.ravel().tolist(), left.ravel().tolist(), strict=True)
            height = target_idx[0, 0].tolist()[-1] // 14 - target_idx[0, 0].tolist()[0] // 14 + 1
            key = height * 100 + target_idx.shape[2] // height
            into.setdefault(key, []).extend(places)
    assert ours.keys() >= {506, 606, 605, 705}
    for key, places in ours.items():
        h, w = divmod(key, 100)
        counts = Counter(places)
        possible = [(top, left) for top in range(14 - h) for left in range(14 - w)]
        assert set(counts) <= set(possible)
        if len(places) > 5000:
            assert stats.chisquare([counts[p] for p in possible]).pvalue > 1e-3
            assert same_distribution(places, theirs[key]) > 1e-3


@pytest.mark.parametrize(
    ("grid", "batch", "steps", "kw"),
    [
        pytest.param(GRID, 1, 4000, {}, id="default-1"),
        pytest.param(GRID, 24, 500, {}, id="default-24"),
        pytest.param((9, 12), 3, 1500, {"context_scale": (0.6, 0.9)}, id="rectangle"),
        pytest.param(
            GRID, 2, 1500, {"allow_overlap": True, "context_scale": (0.4, 0.8)}, id="overlap"
        ),
        pytest.param(  # 37 % of the images are drawn anew, 17 % lose a constraint
            (8, 8), 1, 2500,
            {"context_scale": (0.5, 0.7), "target_scale": (0.24, 0.3), "min_keep": 6},
            id="redraws-and-dropped-constraints",
        ),
    ],
)  # fmt: skip
def test_upstream_lengths_and_visits_match_the_oracle(
    grid: tuple[int, int], batch: int, steps: int, kw: dict[str, Any]
) -> None:
    config = MaskConfig(compat="upstream", **kw)
    ours, oracle = MaskSampler(config, grid, 0), OracleSampler(config, grid)
    torch.manual_seed(0)
    lengths: tuple[list[int], list[int]] = ([], [])
    context_visits: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    target_visits: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    patches = grid[0] * grid[1]
    for step in range(steps):
        mine = ours(step, ids_of(step, batch))[:2]
        context, targets, _ = oracle(batch)
        for side, (c, t) in enumerate([mine, (context.numpy(), targets.numpy())]):
            lengths[side].append(c.shape[1] * 1000 + t.shape[2])
            context_visits[side].append(inclusion(c, patches).mean(axis=0))
            target_visits[side].append(inclusion(t, patches).mean(axis=0))
    assert same_distribution(*([k // 1000 for k in side] for side in lengths)) > 1e-3
    assert same_distribution(*([k % 1000 for k in side] for side in lengths)) > 1e-3
    for visits in (context_visits, target_visits):
        a, b = (np.stack(side) for side in visits)
        np.testing.assert_array_equal(a.any(axis=0), b.any(axis=0))
        error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / steps)
        z = (a.mean(axis=0) - b.mean(axis=0)) / np.maximum(error, 1e-9)
        assert np.abs(z).max() < 4.5, "visits of a patch"


@cache
def run(compat: str, side: int, batch: int, steps: int) -> list[DrawnMasks]:
    masks = sampler(compat, (side, side))
    return [masks(step, ids_of(step, batch)) for step in range(steps)]


@pytest.mark.parametrize(
    ("side", "batch", "targets", "context"),
    [
        (14, 128, (30, 33.4, 40), 50.1),
        (14, 1, (30, 33.4, 40), 81.8),
        (16, 128, (35, 44.2, 54), 68.6),
        (12, 64, (20, 24.4, 30), 36.3),
    ],
)
def test_published_token_counts(
    side: int, batch: int, targets: tuple[int, float, int], context: float
) -> None:
    """Kt (minimum, mean, maximum) by the rule, and the mean Kc of 500 batches (4,000 of one image)
    drawn with the published code itself."""
    drawn = run("upstream", side, batch, 3000 if batch == 1 else 800)
    kt = np.array([m.target_idx.shape[2] for m in drawn])
    kc = np.array([m.context_idx.shape[1] for m in drawn])
    assert (kt.min(), kt.max()) == (targets[0], targets[2])
    assert kt.mean() == pytest.approx(targets[1], abs=0.35)
    assert kc.mean() == pytest.approx(context, abs=1.2)


def test_published_context_blocks_at_28() -> None:
    masks = sampler("upstream", (28, 28))
    drawn = Counter(masks.block_sizes(step)[1] for step in range(4000))
    assert drawn.keys() == {(26, 26), (27, 27)}
    assert drawn[26, 26] / 4000 == pytest.approx(0.31, abs=0.03)


def test_upstream_never_sees_the_last_row_and_column_and_prefers_the_top() -> None:
    drawn = run("upstream", 14, 128, 800)
    context = sum(inclusion(m.context_idx, 196).sum(axis=0) for m in drawn).reshape(14, 14)
    target = sum(inclusion(m.target_idx, 196).sum(axis=0) for m in drawn).reshape(14, 14)
    for visits in (context, target):
        assert not visits[13].any()
        assert not visits[:, 13].any()
    assert (context[:13, :13] > 0).all()
    rows = context.sum(axis=1) / context.sum()
    assert rows[0] == pytest.approx(0.205, abs=0.005)
    assert rows[12] == pytest.approx(0.005, abs=0.003)


# Fixed


def test_fixed_sees_every_patch_and_prefers_no_side() -> None:
    drawn = run("fixed", 14, 128, 800)
    for which in ("context_idx", "target_idx"):
        visits = np.stack([inclusion(getattr(m, which), 196).mean(axis=0) for m in drawn])
        visits = visits.reshape(-1, 14, 14)
        assert (visits.mean(axis=0) > 0).all(), which
        for mirrored in (visits[:, ::-1], visits[:, :, ::-1]):
            difference = (visits - mirrored).reshape(len(visits), -1)
            z = difference.mean(axis=0) / difference.std(axis=0) * np.sqrt(len(visits))
            assert np.nanmax(np.abs(z)) < 4.5, which
        for axis in (1, 2):  # whole rows and columns, where a small preference would add up
            sides = visits.sum(axis=3 - axis)
            difference = (sides - sides[:, ::-1])[:, :7]
            z = difference.mean(axis=0) / difference.std(axis=0) * np.sqrt(len(visits))
            assert np.abs(z).max() < 4, (which, axis)


def test_fixed_offsets_include_both_ends() -> None:
    counts: dict[tuple[int, int], Counter[tuple[int, int]]] = {}
    for step, m in enumerate(run("fixed", 14, 128, 800)):
        size = sampler().block_sizes(step)[0]
        top, left = corners(m.target_idx, GRID)
        places = zip(top.ravel().tolist(), left.ravel().tolist(), strict=True)
        counts.setdefault(size, Counter()).update(places)
    for (h, w), places in counts.items():
        possible = [(top, left) for top in range(15 - h) for left in range(15 - w)]
        assert set(places) == set(possible)
        assert stats.chisquare([places[p] for p in possible]).pvalue > 1e-3


def test_choose_random_draws_every_subset_equally_often() -> None:
    kept = np.zeros((20_000, 12), dtype=bool)
    kept[:, [0, 1, 5, 7, 8, 11]] = True
    keys = np.random.default_rng(0).integers(0, 2**32, 20_000)
    chosen = choose_random(kept, 3, keys)
    assert (chosen.sum(axis=1) == 3).all()
    assert not (chosen & ~kept).any()
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(counts) == 20  # 6 choose 3
    assert stats.chisquare(counts).pvalue > 1e-3


def test_choose_random_is_uniform_on_a_real_grid_with_consecutive_keys() -> None:
    """Single patches and neighbouring pairs of 196, from keys that differ in their low bits."""
    chosen = choose_random(np.ones((8000, 196), dtype=bool), 49, np.arange(8000))
    share = 49 / 196
    z = (chosen.mean(axis=0) - share) / np.sqrt(share * (1 - share) / 8000)
    assert np.abs(z).max() < 4.5
    pair = share * 48 / 195
    for lag in (1, 2, 14):
        z = ((chosen[:, lag:] & chosen[:, :-lag]).mean(axis=0) - pair) / np.sqrt(pair / 8000)
        assert np.abs(z).max() < 4.5, lag


def test_choose_random_where_all_are_kept() -> None:
    kept = np.tri(5, dtype=bool)[[4, 4, 2]]
    chosen = choose_random(kept, 3, np.array([0, 2**32 - 1, 5]))
    assert (chosen.sum(axis=1) == 3).all()
    np.testing.assert_array_equal(chosen[2], kept[2])


def test_fixed_cuts_each_context_to_a_uniform_choice() -> None:
    """The ranks of removed patches in their own uncut context are uniform."""
    masks, ranks = sampler(), []
    for step in range(300):
        ids = ids_of(step, 16)
        cut = masks(step, ids).context_idx
        for row, i in zip(cut, ids, strict=True):
            whole = masks(step, np.array([i])).context_idx[0]
            assert np.isin(row, whole).all()
            removed = np.flatnonzero(~np.isin(whole, row))
            ranks.extend(((removed + 0.5) / len(whole)).tolist())
    histogram = np.histogram(ranks, bins=10, range=(0, 1))[0]
    assert len(ranks) > 50_000
    # Cells are not independent (choice without replacement), so bound the shares instead.
    np.testing.assert_allclose(histogram / len(ranks), 0.1, atol=0.004)


# Properties of both


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
    except ValueError:
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
def test_context_and_targets_are_disjoint_by_default(compat: str) -> None:
    for m in run(compat, 14, 128, 800)[:100]:
        assert not (inclusion(m.context_idx, 196) & inclusion(m.target_idx, 196)).any()


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


# Too little room


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_blocks_below_min_keep_raise_with_the_numbers(compat: str) -> None:
    """T9: the published sampler hangs on an 8x8 grid, where target blocks have 3x3 patches."""
    message = (
        r"mask\.target_scale=\[0\.15, 0\.2\] and mask\.aspect_ratio=\[0\.75, 1\.5\] on a grid of "
        r"8x8 .* as small as 3x3 = 9 .* mask\.min_keep=10; set mask\.min_keep to at most 8,"
    )
    with pytest.raises(ValueError, match=message):
        sampler(compat, (8, 8))
    with pytest.raises(ValueError, match="3x3 = 9"):
        sampler(compat, (8, 8), min_keep=9)  # the comparison is strict
    sampler(compat, (8, 8), min_keep=8)
    with pytest.raises(ValueError, match=r"mask\.context_scale=\[0\.05, 0\.06\] on a grid"):
        sampler(compat, context_scale=(0.05, 0.06))
    with pytest.raises(ValueError, match=r"0x0 = 0 patches.*; raise mask\.target_scale"):
        sampler(compat, (2, 2), min_keep=0)


def test_a_narrow_sliver_of_draws_counts() -> None:
    """The smallest block may come from few draws only; it must still be found."""
    for side in range(6, 30):
        sizes = possible_sizes((0.15, 0.2), (0.75, 1.5), (side, side), (side, side))
        smallest = min(h * w for h, w in sizes)
        with pytest.raises(ValueError, match=f"= {smallest} patches"):
            sampler(grid=(side, side), min_keep=smallest)


def test_fixed_refuses_targets_that_always_fill_the_context() -> None:
    kw: dict[str, Any] = {"target_scale": (0.9, 0.9), "aspect_ratio": ONE, "min_keep": 30}
    message = r"13x13 patches leaves at most 27 of a 14x14 context .* mask\.min_keep=30; lower"
    with pytest.raises(ValueError, match=message):
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


def test_fixed_draws_failing_images_anew_before_it_overlaps() -> None:
    """Rare failures are mended by new places, and only the failing images change."""
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
    """A 7x7 context block has one place on 8x8 (upstream), so only a dropped constraint mends."""
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
