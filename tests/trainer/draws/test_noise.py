"""The standard deviation of each block's noise: what is drawn, and what it depends on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from njepa.config import SIGMA_DATA, NoiseConfig
from njepa.draws.sigmas import block_sigmas

IDS = np.arange(3000, dtype=np.int64)


def draw(sigma: Any, n_targets: int = 4, seed: int = 0, step: int = 3, ids: Any = IDS, **kw: Any):
    return block_sigmas(NoiseConfig(weight=1, sigma=sigma, **kw), n_targets, seed, step, ids)


# A number


def test_the_default_is_sigma_data_for_all() -> None:
    drawn = block_sigmas(NoiseConfig(weight=1), 4, 0, 3, IDS)
    assert SIGMA_DATA == 0.5
    np.testing.assert_array_equal(drawn, np.full((3000, 4), 0.5, dtype=np.float32))


@pytest.mark.parametrize("value", [0, 0.0, 0.1, 2])
@pytest.mark.parametrize("shared", ["per_block", "shared"])
def test_a_number_is_the_same_everywhere_and_always(value: float, shared: Any) -> None:
    for seed, step in ((0, 0), (5, 9)):
        drawn = draw(value, 3, seed, step, IDS[:7], draw=shared)
        np.testing.assert_array_equal(drawn, np.full((7, 3), value, dtype=np.float32))


# Edm


def test_edm_is_log_normal_with_one_draw_for_each_block() -> None:
    z = (np.log(draw("edm").astype(np.float64)) + 1.2) / 1.2
    assert z.shape == (3000, 4)
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(z.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(len(IDS))
    assert np.isfinite(z).all()


def test_edm_of_a_shared_draw_has_one_sigma_for_each_image() -> None:
    drawn = draw("edm", draw="shared")
    assert drawn.shape == (3000, 4)
    assert (drawn == drawn[:, :1]).all()
    z = (np.log(drawn[:, 0].astype(np.float64)) + 1.2) / 1.2
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_edm_is_finite_at_the_ends_of_the_uniform_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their smallest value is 0, where a quantile is -inf, and their largest 1 - 2^-32."""
    ends = np.array([[0.0, 1 - 2.0**-32]])
    monkeypatch.setattr("njepa.draws.sigmas.uniform", lambda *_: ends)
    low, high = draw("edm", 2, ids=IDS[:1])[0].astype(np.float64)
    assert np.log(low) == pytest.approx(-1.2 + 1.2 * stats.norm.ppf(2.0**-33), rel=1e-6)
    assert np.log(high) == pytest.approx(-1.2 + 1.2 * stats.norm.isf(2.0**-33), rel=1e-6)


# A list


def test_as_many_values_as_blocks_come_once_each_in_every_order() -> None:
    values = (2.0, 0.5, 0.25, 0.125)
    drawn = draw(values)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(values[::-1], (3000, 1)))
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_fewer_values_than_blocks_are_balanced() -> None:
    """M = 5, K = 3: two values twice, one once; all 90 arrangements equally likely."""
    drawn = draw((0.0, 1.0, 2.0), 5)
    arrangements, seen = np.unique(drawn.astype(int), axis=0, return_counts=True)
    every = itertools.product(range(3), repeat=5)
    possible = {a for a in every if sorted(map(a.count, range(3))) == [1, 2, 2]}
    assert len(possible) == 90
    assert set(map(tuple, arrangements.tolist())) == possible
    assert stats.chisquare(seen).pvalue > 1e-3


def test_a_value_given_twice_counts_twice() -> None:
    drawn = draw((0.5, 0.5, 1.0, 1.0))
    assert ((drawn == 0.5).sum(axis=1) == 2).all()
    assert len(np.unique(drawn, axis=0)) == 6


def test_a_list_of_one_is_a_number() -> None:
    np.testing.assert_array_equal(draw((0.3,)), draw(0.3))


# what it depends on

FORMS = {
    "number": {"sigma": 0.5},
    "edm": {"sigma": "edm"},
    "edm-shared": {"sigma": "edm", "draw": "shared"},
    "list": {"sigma": (2.0, 0.5, 0.25)},
}


@pytest.mark.parametrize("form", FORMS)
@settings(derandomize=True, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), step=st.integers(0, 2**33))
def test_a_row_depends_on_seed_step_and_id_alone(
    form: str, data: st.DataObject, seed: int, step: int
) -> None:
    ids = np.array(data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=20)))
    rows = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=20)))
    whole = draw(n_targets=5, seed=seed, step=step, ids=ids, **FORMS[form])
    part = draw(n_targets=5, seed=seed, step=step, ids=ids[rows], **FORMS[form])
    np.testing.assert_array_equal(part, whole[rows])
    for drawn in (whole, part):
        assert drawn.dtype == np.float32
        assert drawn.flags.c_contiguous
        assert drawn.shape[1] == 5


@pytest.mark.parametrize("form", ["edm", "list"])
def test_steps_seeds_and_ids_draw_differently(form: str) -> None:
    one = draw(**FORMS[form])
    others = (draw(**FORMS[form], step=4), draw(**FORMS[form], seed=1),
              draw(**FORMS[form], ids=IDS + 3000))  # fmt: skip
    for other in others:
        assert (one != other).any(axis=1).mean() > 0.8
        correlation = np.corrcoef(np.log(one).ravel(), np.log(other).ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(one.size)


@pytest.mark.parametrize("form", FORMS)
def test_no_images(form: str) -> None:
    assert draw(ids=IDS[:0], **FORMS[form]).shape == (0, 4)
