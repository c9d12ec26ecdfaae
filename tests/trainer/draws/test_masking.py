"""The vectorised mask sampler against the per-sample oracle and the published rule."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from njepa.config import MaskConfig
from njepa.draws.masks import DrawnMasks, MaskSampler, block_size, choose_random, possible_sizes
from tests.support.mask_draws import GRID, ONE, corners, ids_of, inclusion, sampler
from tests.support.mask_oracle import OracleSampler
from tests.support.mask_oracle import block_size as oracle_block_size


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
        pytest.param(  # 37 % of the images are drawn again, 17 % lose a constraint
            (8, 8), 1, 2500,
            {"context_scale": (0.5, 0.7), "target_scale": (0.24, 0.3), "min_keep": 6},
            id="redraws-and-dropped-constraints", marks=pytest.mark.slow,
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


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_context_and_targets_are_disjoint_by_default(compat: str) -> None:
    for m in run(compat, 14, 128, 800)[:100]:
        assert not (inclusion(m.context_idx, 196) & inclusion(m.target_idx, 196)).any()
