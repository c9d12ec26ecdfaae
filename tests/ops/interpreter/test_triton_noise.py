"""The noise that the Triton kernels draw in registers against philox.py."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from njepa_kernels import NoiseKey, philox_normal, predictor_tokens
from njepa_kernels._runtime.triton_noise import _box_muller, _cos_sin, _log

from tests.support.noise_checks import check_draws, noise_of


@triton.jit
def _unary_kernel(out_ptr, other_ptr, x_ptr, LOG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if LOG:
        tl.store(out_ptr + at, _log(x))
    else:
        cosine, sine = _cos_sin(x)
        tl.store(out_ptr + at, cosine)
        tl.store(other_ptr + at, sine)


def _unary(x: torch.Tensor, log: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, other = torch.empty_like(x), torch.empty_like(x)
    _unary_kernel[(x.numel() // 1024,)](out, other, x, LOG=log, BLOCK=1024)
    return out, other


def test_log_is_good_to_two_ulp_everywhere() -> None:
    n = torch.cat((torch.arange(1, 32769), torch.arange(2**24 - 32767, 2**24 + 1)))
    spread = torch.randint(1, 2**24 + 1, (65536,))
    u = torch.cat((n, spread)).float() * 2.0**-24
    exact = u.double().log()
    error = (_unary(u, True)[0].double() - exact).abs()
    assert float((error / exact.abs().clamp_min(1e-30))[exact != 0].max()) < 2 * 2.0**-23
    assert float(error[exact == 0].max()) == 0.0


def test_cos_and_sin_are_good_to_1e_7() -> None:
    x = torch.rand(65536) * 2 * math.pi
    edges = torch.arange(9) * (math.pi / 4)
    x[: len(edges)] = edges
    cosine, sine = _unary(x, False)
    assert float((cosine.double() - x.double().cos()).abs().max()) < 1.2e-7
    assert float((sine.double() - x.double().sin()).abs().max()) < 1.2e-7


@triton.jit
def _pair_kernel(first_ptr, second_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at).to(tl.uint32), tl.load(b_ptr + at).to(tl.uint32)
    first, second = _box_muller(a, b)
    tl.store(first_ptr + at, first)
    tl.store(second_ptr + at, second)


def test_extreme_words_give_finite_normals() -> None:
    words = torch.tensor([0, 255, 256, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1, 12345])
    a, b = (grid.flatten() for grid in torch.meshgrid(words, words, indexing="ij"))
    first, second = torch.empty(64), torch.empty(64)
    _pair_kernel[(1,)](first, second, a, b, BLOCK=64)
    assert bool(first.isfinite().all())
    assert bool(second.isfinite().all())
    radius = (-2 * (((a >> 8) + 1).double() * 2.0**-24).log()).sqrt()
    torch.testing.assert_close(torch.hypot(first, second).double(), radius, rtol=1e-6, atol=1e-6)


_noise = noise_of(partial(predictor_tokens, impl="triton"))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [1, 30, 384])
@pytest.mark.parametrize(
    ("seed", "step"), [(0, 0), (1, 1), (-3, 2**40 + 9), (2**31, 2**32 - 1), (16, 32)]
)
def test_equal_to_1e_6(width: int, seed: int, step: int, shared: bool) -> None:
    ids = torch.tensor([0, 2**31 + 5, 2**33 + 1])
    idx = torch.randint(0, 200, (3, 4, 5))
    noise = NoiseKey(seed, step, ids, shared)
    expected = philox_normal(noise, idx, width)
    got = _noise(noise, idx, width)
    assert float(((got - expected).abs() / expected.abs().clamp_min(1.0)).max()) <= 1e-6
    noise = noise._replace(step=torch.tensor(step))
    assert torch.equal(_noise(noise, idx, width), got)
    assert torch.equal(philox_normal(noise, idx, width), expected)


def test_independent_of_the_batch() -> None:
    ids, idx = torch.tensor([5, 9, 2]), torch.randint(0, 36, (3, 2, 4))
    whole = _noise(NoiseKey(1, 2, ids), idx, 40)
    order = torch.tensor([2, 0])
    assert torch.equal(_noise(NoiseKey(1, 2, ids[order]), idx[order], 40), whole[order])


def test_draws_per_block_and_shared() -> None:
    check_draws(_noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sigma_zero_is_clean_bit_for_bit(dtype: torch.dtype) -> None:
    inputs: dict[str, Any] = {
        "context": torch.randn(2, 3, 20).to(dtype),
        "pos": torch.randn(9, 20),
        "mask_token": torch.randn(20),
        "context_idx": torch.randint(0, 9, (2, 3)),
        "target_idx": torch.randint(0, 9, (2, 2, 3)),
        "noise": NoiseKey(0, 0, torch.arange(2)),
        "impl": "triton",
    }
    clean = predictor_tokens(**inputs)
    assert torch.equal(predictor_tokens(**inputs, sigma=torch.zeros(2, 2)), clean)
    # Beside a noised block, in the same program.
    sigma = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    mixed = predictor_tokens(**inputs, sigma=sigma).view(2, 2, 6, 20)
    expected = clean.view(2, 2, 6, 20)
    assert torch.equal(mixed[0, 0], expected[0, 0])
    assert torch.equal(mixed[1, 1], expected[1, 1])
    assert not torch.equal(mixed[1, 0, 3:], expected[1, 0, 3:])


def test_nan_in_sigma_is_not_hidden() -> None:
    out = predictor_tokens(
        torch.zeros(1, 0, 8),
        torch.zeros(4, 8),
        torch.zeros(8),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(1, 1, 1, dtype=torch.int64),
        torch.full((1, 1), float("nan")),
        NoiseKey(0, 0, torch.zeros(1, dtype=torch.int64)),
        impl="triton",
    )
    assert bool(out.isnan().all())
