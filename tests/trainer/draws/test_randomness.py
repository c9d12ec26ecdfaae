"""The counter-based generator behind order, crops, masks and sigmas."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from njepa_kernels._runtime.philox import philox4x32
from scipy import stats

from njepa.draws.streams import STREAMS, permutation, stream_seed, uniform, uniform_of_step, words

IDS = np.arange(2000, dtype=np.int64)


def test_words_follow_the_documented_counter() -> None:
    """Against scalar Philox with Python ints, ids beyond 32 bits and a step beyond 32 bits."""
    ids = np.array([0, 7, 2**32 + 5, 2**40 - 1], dtype=np.int64)
    step, count, attempt = 2**32 + 9, 6, 3
    got = words(11, "crop", step, ids, count, attempt)
    key = stream_seed(11, "crop")
    for row, i in zip(got, ids.tolist(), strict=True):
        expected = [
            word
            for quad in range(2)
            for word in philox4x32(i % 2**32, i // 2**32, quad, attempt, key, 9)
        ]
        assert row.tolist() == expected[:count]
    np.testing.assert_array_equal(uniform(11, "crop", step, ids, count, attempt), got / 2**32)
    assert uniform_of_step(11, "crop", step) == tuple(uniform(11, "crop", step, ids, 4)[0])


def test_stream_seed_follows_its_formula() -> None:
    name = zlib.crc32(b"init/encoder")
    assert stream_seed(2**32 + 4, "init/encoder") == philox4x32(name, 0, 0, 0, 4, 0)[0]


def test_known_values_never_change() -> None:
    """A run is resumed with these numbers: changing one breaks every old checkpoint."""
    assert stream_seed(0, "order") == 2989362186
    assert permutation(0, 0, 10).tolist() == [0, 5, 8, 6, 1, 2, 3, 4, 7, 9]


@settings(derandomize=True, deadline=None)
@given(
    ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=40),
    count=st.integers(0, 9),
    data=st.data(),
)
def test_a_row_depends_on_its_id_alone(ids: list[int], count: int, data: st.DataObject) -> None:
    batch = np.array(ids, dtype=np.int64)
    full = uniform(1, "sigma", 5, batch, count)
    rows = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=10)), dtype=np.int64)
    np.testing.assert_array_equal(uniform(1, "sigma", 5, batch[rows], count), full[rows])
    np.testing.assert_array_equal(uniform(1, "sigma", 5, batch, count + 3)[:, :count], full)


def test_long_id_lists_are_drawn_in_chunks_without_a_seam() -> None:
    ids = np.arange(40_000, dtype=np.int64)
    whole = words(3, "order", 0, ids, 5)
    np.testing.assert_array_equal(words(3, "order", 0, ids[16_000:17_000], 5), whole[16_000:17_000])


def test_uniform_is_uniform() -> None:
    x = uniform(0, "crop", 0, IDS, 50)
    assert x.min() >= 0
    assert x.max() < 1
    assert stats.kstest(x.ravel(), "uniform").pvalue > 1e-3
    # Neighbouring draws, ids, steps and streams are unrelated.
    others = {
        "draw": (x[:, :-1], x[:, 1:]),
        "id": (x[:-1], x[1:]),
        "step": (x, uniform(0, "crop", 1, IDS, 50)),
        "seed": (x, uniform(1, "crop", 0, IDS, 50)),
        "attempt": (x, uniform(0, "crop", 0, IDS, 50, attempt=1)),
        "stream": (x, uniform(0, "flip", 0, IDS, 50)),
    }
    for name, (a, b) in others.items():
        r = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(r) < 4 / np.sqrt(a.size), (name, r)


def test_streams_and_seeds_have_different_keys() -> None:
    names = [*STREAMS, "init/encoder", "init/predictor"]
    keys = {stream_seed(seed, name) for seed in range(100) for name in names}
    assert len(keys) == 100 * len(names)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_permutation_is_a_permutation(n: int) -> None:
    assert sorted(permutation(4, 2, n).tolist()) == list(range(n))


def test_permutations_are_equally_likely() -> None:
    codes = [int("".join(map(str, permutation(0, epoch, 4)))) for epoch in range(2400)]
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'crops'; did you mean 'crop'\?"):
        stream_seed(0, "crops")
    with pytest.raises(ValueError, match="init/<module>"):
        stream_seed(0, "init/")
    with pytest.raises(TypeError, match="int64 array, got int32"):
        uniform(0, "crop", 0, np.arange(3, dtype=np.int32), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \[n\], got \[1, 3\]"):
        uniform(0, "crop", 0, np.arange(3).reshape(1, 3), 1)
    with pytest.raises(ValueError, match="n >= 0, got -1"):
        permutation(0, 0, -1)
