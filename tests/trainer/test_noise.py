"""Noise schedules, and the level of each block."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from njepa.config import NoiseConfig
from njepa.noise import NoiseLevels

IDS = np.arange(3000, dtype=np.int64)
PSI = 1 / math.sqrt(2)


def build(n_targets: int = 4, pos_rms: float = PSI, total_steps: int = 100, **kw: Any):
    return NoiseLevels(NoiseConfig(weight=1, **kw), n_targets, pos_rms, 0, total_steps)


# --- schedules -----------------------------------------------------------------------------------


def test_karras_defaults() -> None:
    np.testing.assert_allclose(build().sigmas(0), [2.0, 0.716, 0.215, 0.050], atol=5e-4)


def test_karras_is_edms_sampling_grid() -> None:
    """First, second and last of the 18 steps between 80 and 0.002 with ρ = 7."""
    sigma = build(18, levels=18, sigma_min=0.002, sigma_max=80.0).sigmas(0)
    np.testing.assert_allclose(sigma[[0, 1, 17]], [80.0, 57.586, 0.002], rtol=1e-5)


def test_log_normal_levels_are_mid_quantiles() -> None:
    levels = build(schedule="edm_lognormal").sigmas(0)
    np.testing.assert_allclose(levels, [1.198, 0.442, 0.206, 0.076], atol=1e-3)
    quantiles = stats.norm.cdf((np.log(levels.astype(np.float64)) + 1.2) / 1.2)
    np.testing.assert_allclose(quantiles, [7 / 8, 5 / 8, 3 / 8, 1 / 8], atol=1e-6)


def test_linear_and_cosine() -> None:
    linear = build(schedule="linear", levels=3, sigma_min=0.0, sigma_max=2.0).sigmas(0)
    np.testing.assert_allclose(linear, [2.0, 1.0, 0.0], atol=1e-7)
    cosine = build(schedule="cosine", levels=3, sigma_min=0.1, sigma_max=3.0).sigmas(0)
    middle = math.tan((math.atan(0.1) + math.atan(3.0)) / 2)
    np.testing.assert_allclose(cosine, [3.0, middle, 0.1], rtol=1e-6)


def test_vp_levels_are_evenly_spaced_in_time() -> None:
    sigma = build(5, schedule="vp", levels=5, sigma_min=0.05, sigma_max=4.0).sigmas(0)
    t = np.linspace(0, 1, 200_001)
    curve = np.sqrt(np.exp(0.5 * 19.9 * t**2 + 0.1 * t) - 1)
    times = np.interp(sigma, curve, t)  # the inverse by table
    np.testing.assert_allclose(sigma[[0, -1]], [4.0, 0.05], rtol=1e-6)
    np.testing.assert_allclose(np.diff(times), np.diff(times).mean(), atol=1e-5)


def test_fixed_and_list() -> None:
    assert build(schedule="fixed", levels=1, sigma_max=0.25).sigmas(0).tolist() == [0.25]
    values = (0.5, 0.0, 1.5)
    assert build(schedule="list", levels=3, sigmas=values).sigmas(0).tolist() == [*values]


@pytest.mark.parametrize("kind", ["karras", "edm_lognormal", "linear", "cosine", "vp"])
@pytest.mark.parametrize("levels", [1, 2, 7])
def test_the_first_level_is_the_largest(kind: str, levels: int) -> None:
    sigma = build(levels, schedule=kind, levels=levels).sigmas(0)
    assert sigma.shape == (levels,)
    assert sigma.dtype == np.float32
    assert (np.diff(sigma) < 0).all()
    if levels == 1:
        assert sigma[0] == pytest.approx(math.exp(-1.2) if kind == "edm_lognormal" else 2.0)


def test_unit_relative_multiplies_by_the_rms_of_the_positions() -> None:
    absolute, relative = build().sigmas(0), build(unit="relative", pos_rms=0.35).sigmas(0)
    np.testing.assert_allclose(relative, 0.35 * absolute, rtol=1e-6)
    np.testing.assert_array_equal(build(pos_rms=0.35).sigmas(0), absolute)


def test_annealing_is_linear_and_ends_at_its_factor() -> None:
    noise = build(anneal_to=0.2, total_steps=101)
    start = noise.sigmas(0)
    np.testing.assert_array_equal(start, build().sigmas(0))
    for step, factor in ((50, 0.6), (100, 0.2), (500, 0.2)):
        np.testing.assert_allclose(noise.sigmas(step), factor * start, rtol=1e-6)
        drawn = noise.assign(step, IDS, 6)
        np.testing.assert_array_equal(drawn.sigma, noise.sigmas(step)[drawn.levels])
    jittered = build(anneal_to=0.2, total_steps=101, schedule="edm_lognormal", jitter=True)
    constant = build(schedule="edm_lognormal", jitter=True)
    np.testing.assert_allclose(
        jittered.assign(100, IDS, 6).sigma, 0.2 * constant.assign(100, IDS, 6).sigma, rtol=1e-6
    )


# --- maps ----------------------------------------------------------------------------------------


def test_per_block_gives_each_level_once_in_every_order() -> None:
    drawn = build().assign(3, IDS, 6)
    assert drawn.levels.shape == drawn.sigma.shape == (3000, 4)
    assert drawn.levels.dtype == np.int64
    assert drawn.sigma.dtype == np.float32
    np.testing.assert_array_equal(np.sort(drawn.levels, axis=1), np.tile(np.arange(4), (3000, 1)))
    _, counts = np.unique(drawn.levels, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_per_block_with_fewer_levels_than_blocks_is_balanced() -> None:
    """M = 5, K = 3: two levels twice, one once; all 90 arrangements equally likely."""
    levels = build(5, levels=3).assign(3, IDS, 6).levels
    counts = np.stack([(levels == k).sum(1) for k in range(3)], axis=1)
    assert set(map(tuple, np.sort(counts, axis=1))) == {(1, 2, 2)}
    arrangements, seen = np.unique(levels, axis=0, return_counts=True)
    every = itertools.product(range(3), repeat=5)
    possible = {a for a in every if sorted(map(a.count, range(3))) == [1, 2, 2]}
    assert set(map(tuple, arrangements.tolist())) == possible
    assert stats.chisquare(seen).pvalue > 1e-3


def test_per_token_is_uniform_and_independent() -> None:
    levels = build(map="per_token", levels=6).assign(0, IDS[:500], 7).levels
    assert levels.shape == (500, 4, 7)
    assert stats.chisquare(np.bincount(levels.ravel(), minlength=6)).pvalue > 1e-3
    pairs = np.bincount((levels[..., :-1] * 6 + levels[..., 1:]).ravel(), minlength=36)
    assert stats.chi2_contingency(pairs.reshape(6, 6)).pvalue > 1e-3


def test_per_sample_shares_a_level_in_an_image() -> None:
    levels = build(map="per_sample", levels=6).assign(0, IDS, 7).levels
    assert levels.shape == (3000, 4)
    assert (levels == levels[:, :1]).all()
    assert stats.chisquare(np.bincount(levels[:, 0], minlength=6)).pvalue > 1e-3


def test_per_batch_shares_a_level_in_a_step() -> None:
    noise = build(map="per_batch", levels=6)
    drawn = [noise.assign(step, IDS[:3], 7).levels for step in range(1200)]
    assert drawn[0].shape == (3, 4)
    assert all((levels == levels[0, 0]).all() for levels in drawn)
    assert stats.chisquare(np.bincount([d[0, 0] for d in drawn], minlength=6)).pvalue > 1e-3


def test_all_is_level_major() -> None:
    drawn = build(3, map="all", levels=2).assign(0, IDS[:2], 7)
    assert drawn.levels.tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    np.testing.assert_array_equal(drawn.sigma, build(3, levels=2).sigmas(0)[drawn.levels])


MAPS = ["per_block", "per_token", "per_sample", "per_batch", "all"]


@pytest.mark.parametrize("where", MAPS)
def test_jitter_stays_in_the_bin_and_makes_sigma_log_normal(where: str) -> None:
    plain = build(map=where, schedule="edm_lognormal")
    noise = build(map=where, schedule="edm_lognormal", jitter=True)
    steps = range(1500) if where == "per_batch" else [2]
    ids = IDS[:3] if where == "per_batch" else IDS[:600]
    drawn = [noise.assign(step, ids, 5) for step in steps]
    levels = np.concatenate([d.levels for d in drawn])
    sigma = np.concatenate([d.sigma for d in drawn]).astype(np.float64)
    np.testing.assert_array_equal(levels[: len(ids)], plain.assign(steps[0], ids, 5).levels)
    quantile = stats.norm.cdf((np.log(sigma) + 1.2) / 1.2)
    np.testing.assert_array_equal(np.floor(quantile * 4), 3 - levels)
    units = {"per_sample": quantile[:, 0], "per_batch": quantile[:: len(ids), 0]}
    assert stats.kstest(units.get(where, quantile).ravel(), "uniform").pvalue > 1e-3
    if where in units:  # what shares a level shares its σ
        assert (sigma == sigma[:, :1]).all()


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("jitter", [False, True])
@settings(derandomize=True, deadline=None)
@given(data=st.data(), step=st.integers(0, 2**33))
def test_levels_depend_on_seed_step_and_id_alone(
    where: str, jitter: bool, data: st.DataObject, step: int
) -> None:
    noise = build(map=where, schedule="edm_lognormal", jitter=jitter)
    ids = np.array(data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=20)))
    rows = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=20)))
    whole, part = noise.assign(step, ids, 5), noise.assign(step, ids[rows], 5)
    np.testing.assert_array_equal(part.levels, whole.levels[rows])
    np.testing.assert_array_equal(part.sigma, whole.sigma[rows])
    assert part.levels.flags.c_contiguous
    assert part.sigma.flags.c_contiguous


def test_steps_and_seeds_draw_differently() -> None:
    one = build().assign(0, IDS, 5).levels
    for other in (
        build().assign(1, IDS, 5).levels,
        NoiseLevels(NoiseConfig(weight=1), 4, PSI, 1, 100).assign(0, IDS, 5).levels,
    ):
        table = np.bincount((one * 4 + other).ravel(), minlength=16).reshape(4, 4)
        assert stats.chi2_contingency(table).pvalue > 1e-3


# --- errors --------------------------------------------------------------------------------------


def test_more_levels_than_blocks() -> None:
    with pytest.raises(ValueError, match=r"mask\.n_targets=2 .* got noise\.levels=4; lower"):
        build(2)
    assert build(2, map="per_token").assign(0, IDS, 5).levels.max() == 3
    idle = NoiseLevels(NoiseConfig(weight=0), 2, PSI, 0, 100)  # no noised branch, no complaint
    assert not idle.active
    assert build().active


@pytest.mark.parametrize(("pos_rms", "steps"), [(0.0, 1), (math.nan, 1), (1.0, 0)])
def test_bad_runtime_values(pos_rms: float, steps: int) -> None:
    with pytest.raises(ValueError, match="pos_rms > 0 and total_steps >= 1"):
        build(pos_rms=pos_rms, total_steps=steps)
