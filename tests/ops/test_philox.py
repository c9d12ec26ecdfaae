"""The noise stream: the published vectors, three array types, and the statistics of the normals."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from njepa_kernels import NoiseKey, philox_normal
from njepa_kernels._runtime.philox import philox4x32

from tests.support.noise_checks import check_draws

# Known-answer vectors of Random123 (kat_vectors, philox4x32 10): counter, key, result.
KNOWN = [
    (
        [0, 0, 0, 0],
        [0, 0],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert list(philox4x32(*counter, *key)) == expected
    as_torch = [torch.tensor([word]) for word in (*counter, *key)]
    assert [int(word) for word in philox4x32(*as_torch)] == expected
    as_numpy = [np.array([word], dtype=np.int64) for word in (*counter, *key)]
    with np.errstate(all="raise"):
        assert [int(word[0]) for word in philox4x32(*as_numpy)] == expected


def _words(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 in unbounded integers, written from the definition of a round."""
    x, k = list(counter), list(key)
    for round_number in range(10):
        if round_number:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
    return x


def test_arrays_and_ints_agree_with_the_definition() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, size=(6, 300), dtype=np.int64)
    words[:, :2] = [[0, 2**32 - 1]]
    by_numpy = philox4x32(*words)
    by_torch = philox4x32(*torch.from_numpy(words))
    for i in range(words.shape[1]):
        column = [int(w) for w in words[:, i]]
        expected = _words(tuple(column[:4]), tuple(column[4:]))
        assert list(philox4x32(*column)) == expected
        assert [int(w[i]) for w in by_numpy] == expected
        assert [int(w[i]) for w in by_torch] == expected


def test_arguments_broadcast() -> None:
    c0, c3 = np.arange(3)[:, None], np.arange(5)
    words = philox4x32(c0, 1, 2, c3, 3, 4)
    assert all(np.broadcast_shapes(np.shape(w), (3, 5)) == (3, 5) for w in words)
    for i in range(3):
        for j in range(5):
            expected = _words((i, 1, 2, j), (3, 4))
            assert [int(np.broadcast_to(w, (3, 5))[i, j]) for w in words] == expected


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dim", [1, 4, 10, 64])
def test_normals_against_the_formula(dim: int, shared: bool) -> None:
    seed, step = -3, 2**40 + 9
    ids = torch.tensor([5, 2**33 + 1])
    patches = torch.randint(0, 196, (2, 3, 2))
    got = philox_normal(NoiseKey(seed, step, ids, shared), patches, dim)
    assert got.shape == (2, 3, 2, dim)
    assert got.dtype == torch.float32
    for b, m, t, c in np.ndindex(*got.shape):
        counter = (int(ids[b]) % 2**32, 0 if shared else m, int(patches[b, m, t]), c // 4)
        words = _words(counter, (seed % 2**32, step % 2**32))
        first, second = words[:2] if c % 4 < 2 else words[2:]
        radius = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24))
        angle = 2 * math.pi * (second >> 8) / 2**24
        expected = radius * (math.sin(angle) if c % 2 else math.cos(angle))
        assert float(got[b, m, t, c]) == pytest.approx(expected, abs=2e-6)


def test_a_shorter_width_is_a_prefix() -> None:
    ids, patches = torch.arange(2), torch.arange(6).view(2, 1, 3)
    wide = philox_normal(NoiseKey(1, 2, ids), patches, 12)
    for dim in (0, 1, 7, 11):
        assert torch.equal(philox_normal(NoiseKey(1, 2, ids), patches, dim), wide[..., :dim])


def test_every_coordinate_counts_and_only_those() -> None:
    ids, patches = torch.tensor([3, 8]), torch.tensor([[[1, 2]], [[1, 2]]])
    base = philox_normal(NoiseKey(1, 2, ids), patches, 8)
    others = [
        philox_normal(NoiseKey(2, 2, ids), patches, 8),
        philox_normal(NoiseKey(1, 3, ids), patches, 8),
        philox_normal(NoiseKey(2, 1, ids), patches, 8),
        philox_normal(NoiseKey(1, 2, ids + 1), patches, 8),
        philox_normal(NoiseKey(1, 2, ids), patches + 2, 8),
        philox_normal(NoiseKey(1, 2, ids), patches.expand(-1, 2, -1), 8)[:, 1:],
    ]
    for other in others:
        assert not (base == other).any()
    assert not (base[0] == base[1]).any()
    assert torch.equal(philox_normal(NoiseKey(1, 2, ids), patches, 8), base)
    assert torch.equal(philox_normal(NoiseKey(1 + 2**32, 2 - 2**32, ids), patches, 8), base)


def test_independent_of_the_layout_of_the_batch() -> None:
    ids, patches = torch.randperm(1000)[:12], torch.randint(0, 196, (12, 4, 9))
    whole = philox_normal(NoiseKey(4, 5, ids), patches, 30)
    order = torch.randperm(12)
    assert torch.equal(philox_normal(NoiseKey(4, 5, ids[order]), patches[order], 30), whole[order])
    halves = [
        philox_normal(NoiseKey(4, 5, ids[s]), patches[s], 30) for s in (slice(0, 5), slice(5, 12))
    ]
    assert torch.equal(torch.cat(halves), whole)
    tokens = torch.randperm(9)
    assert torch.equal(
        philox_normal(NoiseKey(4, 5, ids), patches[:, :, tokens], 30), whole[:, :, tokens]
    )
    fewer = philox_normal(NoiseKey(4, 5, ids), patches[:, :2], 30)
    assert torch.equal(fewer, whole[:, :2])


def test_draws_per_block_and_shared() -> None:
    check_draws(philox_normal)


@pytest.fixture(scope="module")
def ten_million() -> torch.Tensor:
    """[samples, blocks, patches, dim], patches in grid order: 10,035,200 draws."""
    patches = torch.arange(196).expand(50, 4, -1)
    return philox_normal(NoiseKey(2026, 17, torch.arange(50)), patches, 256)


def test_moments(ten_million: torch.Tensor) -> None:
    x = ten_million.double()
    n = x.numel()
    assert n > 10_000_000
    assert bool(x.isfinite().all())
    # 5 standard errors: sd of n^k for a normal is sqrt(E n^2k - (E n^k)^2).
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - mean) < 5 * math.sqrt(variance / n), power


def test_tails_and_shape(ten_million: torch.Tensor) -> None:
    n = ten_million.numel()
    for bound in (1.0, 2.0, 3.0, 4.0, 4.8):
        p = math.erfc(bound / math.sqrt(2)) / 2
        for tail in (ten_million > bound, ten_million < -bound):
            assert abs(int(tail.sum()) - n * p) < 5 * math.sqrt(n * p), bound
    assert float(ten_million.abs().max()) <= math.sqrt(48 * math.log(2)) + 1e-5
    bins = 128
    uniform = torch.special.ndtr(ten_million.double())
    counts = torch.histc(uniform, bins, 0.0, 1.0)
    chi_square = float(((counts - n / bins) ** 2 / (n / bins)).sum())
    assert abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("square", [False, True])
def test_neighbours_are_not_correlated(ten_million: torch.Tensor, axis: int, square: bool) -> None:
    x = (ten_million**2 - 1) / math.sqrt(2) if square else ten_million
    for lag in (1, 2, 3) if axis == 3 else (1,):
        size = x.shape[axis] - lag
        product = x.narrow(axis, 0, size) * x.narrow(axis, lag, size)
        assert abs(float(product.double().mean())) < 5 / math.sqrt(product.numel()), lag


def test_neighbouring_steps_and_seeds_are_not_correlated() -> None:
    ids, patches = torch.arange(8), torch.arange(64).expand(8, 4, -1)
    base = philox_normal(NoiseKey(0, 0, ids), patches, 128)
    for seed, step in ((0, 1), (1, 0), (1, 1)):
        other = philox_normal(NoiseKey(seed, step, ids), patches, 128)
        assert abs(float((base * other).mean())) < 5 / math.sqrt(base.numel())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"patches": torch.zeros(2, 3).long()},
            ValueError,
            "philox_normal: patches must be [B,M,Kt]",
        ),
        (
            {"patches": torch.full((2, 1, 1), -1)},
            ValueError,
            "patches must be int64 in [0, 4294967296",
        ),
        (
            {"noise": NoiseKey(1, 2, torch.arange(3))},
            ValueError,
            "philox_normal: noise.sample_ids must be [B] = [2], got [3]",
        ),
        (
            {"noise": NoiseKey(1, 2, torch.zeros(2))},
            TypeError,
            "sample_ids must be int64, got floa",
        ),
        (
            {"noise": NoiseKey(True, 2, torch.arange(2))},
            TypeError,
            "noise.seed must be an int, got",
        ),
        ({"noise": None}, TypeError, "noise must be a NoiseKey(seed, step, sample_ids, shared=Fal"),
        ({"dim": -1}, ValueError, "dim must be at least 0, got -1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"noise": NoiseKey(1, 2, torch.arange(2)), "patches": torch.zeros(2, 1, 1).long()}
    with pytest.raises(error, match=re.escape(message)):
        philox_normal(**({"dim": 4} | good | change))
