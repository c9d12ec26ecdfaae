"""predictor_tokens against loops; the noise against what method T3 and T7 ask of it."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from njepa_kernels import NoiseKey, philox_normal, predictor_tokens
from njepa_kernels._runtime.dispatch import IMPLEMENTATIONS, choose

from tests.support.noise_checks import check_draws, noise_of

B, M, KC, KT, N, WIDTH = 3, 2, 5, 4, 16, 10
IDS = torch.tensor([40, 2, 7])


def _runs(impl: str) -> bool:
    try:
        return choose("predictor_tokens", impl, torch.device("cpu")) == impl
    except RuntimeError:
        return False


each_impl = pytest.mark.parametrize("impl", [i for i in IMPLEMENTATIONS if _runs(i)])


def _inputs(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "context": torch.randn(B, KC, WIDTH, generator=g),
        "pos": torch.randn(N, WIDTH, generator=g),
        "mask_token": torch.randn(WIDTH, generator=g),
        "context_idx": torch.randint(0, N, (B, KC), generator=g),
        "target_idx": torch.randint(0, N, (B, M, KT), generator=g),
        "sigma": torch.rand(B, M, generator=g) * 2,
        "noise": NoiseKey(11, 5, IDS),
    }


@each_impl
@pytest.mark.parametrize("step", [0, 5, 2**32 - 1, 2**40 + 9, -3])
def test_a_step_that_is_a_tensor_has_the_bits_of_the_number(impl: str, step: int) -> None:
    inputs = _inputs()
    found = []
    for value in (step, torch.tensor(step)):
        inputs["sigma"] = inputs["sigma"].detach().requires_grad_()
        inputs["noise"] = NoiseKey(11, value, IDS)
        out = predictor_tokens(**inputs, impl=impl)
        (dsigma,) = torch.autograd.grad(out.square().sum(), inputs["sigma"])
        found.append((out, dsigma))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    inputs["noise"] = NoiseKey(11, torch.tensor(step + 1), IDS)
    assert not torch.equal(predictor_tokens(**inputs, impl=impl), found[0][0])


def _loop(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    normals: torch.Tensor,
) -> torch.Tensor:
    """Row after row, token after token, in the published order (block-major)."""
    rows = []
    for m in range(target_idx.shape[1]):
        for b in range(target_idx.shape[0]):
            tokens = [context[b, i] + pos[j] for i, j in enumerate(context_idx[b].tolist())]
            for t, j in enumerate(target_idx[b, m].tolist()):
                psi = pos[j]
                if sigma is not None:
                    psi = psi + sigma[b, m] * normals[b, m, t]
                tokens.append(mask_token + psi)
            rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("noise", [None, "per_block", "shared"])
def test_values_and_gradients_against_the_loop(noise: str | None) -> None:
    inputs = _inputs()
    key = NoiseKey(11, 5, IDS, shared=noise == "shared")
    inputs |= {"noise": key} if noise else {"noise": None, "sigma": None}
    names = [n for n in ("context", "pos", "mask_token", "sigma") if inputs[n] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]
    normals = philox_normal(key, inputs["target_idx"], WIDTH)
    out = predictor_tokens(**inputs)
    arrays = {k: inputs[k] for k in ("context", "pos", "mask_token", "context_idx", "target_idx")}
    expected = _loop(**arrays, sigma=inputs["sigma"], normals=normals)
    assert out.shape == (M * B, KC + KT, WIDTH)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    for name, got, want in zip(names, grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_impl
def test_sigma_zero_is_no_noise_bit_for_bit(impl: str, dtype: torch.dtype) -> None:
    inputs = _inputs()
    inputs["context"] = inputs["context"].to(dtype)
    clean = predictor_tokens(**(inputs | {"sigma": None}), impl=impl)
    assert clean.dtype == dtype
    assert torch.equal(
        predictor_tokens(**(inputs | {"sigma": torch.zeros(B, M)}), impl=impl), clean
    )
    # Beside noised blocks: sigma is of the block, sample and block are not mixed up.
    sigma = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    mixed = predictor_tokens(**(inputs | {"sigma": sigma}), impl=impl).view(M, B, KC + KT, WIDTH)
    expected = clean.view(M, B, KC + KT, WIDTH)
    for b in range(B):
        for m in range(M):
            assert torch.equal(mixed[m, b, :KC], expected[m, b, :KC])
            same = torch.equal(mixed[m, b, KC:], expected[m, b, KC:])
            assert same == (sigma[b, m] == 0)


@each_impl
def test_a_key_without_sigma_draws_nothing(impl: str) -> None:
    inputs = _inputs() | {"sigma": None}
    clean = predictor_tokens(**(inputs | {"noise": None}), impl=impl)
    assert torch.equal(predictor_tokens(**inputs, impl=impl), clean)


@each_impl
def test_draws_per_block_and_shared(impl: str) -> None:
    check_draws(noise_of(partial(predictor_tokens, impl=impl)))


@pytest.mark.parametrize("impl", [i for i in ("native", "reference") if _runs(i)])
def test_no_work_for_positions_that_are_frozen(impl: str) -> None:
    """A backward that does not need dpos makes no table of the size of pos, not even for a time."""
    n, width = 4096, 64
    inputs = _inputs() | {
        "context": torch.randn(B, KC, width, requires_grad=True),
        "pos": torch.randn(n, width),
        "mask_token": torch.randn(width, requires_grad=True),
        "sigma": torch.rand(B, M, requires_grad=True),
    }
    allocated = {}
    for learnt in (False, True):
        inputs["pos"].requires_grad_(learnt)
        out = predictor_tokens(**inputs, impl=impl)
        with torch.profiler.profile(profile_memory=True) as profile:
            out.sum().backward()
        sizes = [event.self_cpu_memory_usage for event in profile.events()]
        allocated[learnt] = max(sizes)
    assert allocated[False] < n * width  # bytes: a quarter of the table
    assert allocated[True] >= 4 * n * width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_fp32_result_rounded_once(dtype: torch.dtype) -> None:
    inputs = _inputs()
    inputs |= {name: inputs[name].to(dtype) for name in ("context", "mask_token")}
    wide = inputs | {name: inputs[name].float() for name in ("context", "mask_token")}
    assert torch.equal(predictor_tokens(**inputs), predictor_tokens(**wide).to(dtype))


def test_sigma_zero_still_has_a_gradient_for_sigma() -> None:
    inputs = _inputs()
    inputs["sigma"] = torch.zeros(B, M, requires_grad=True)
    predictor_tokens(**inputs).sum().backward()
    normals = philox_normal(inputs["noise"], inputs["target_idx"], WIDTH)
    expected = normals.sum((2, 3))
    torch.testing.assert_close(inputs["sigma"].grad, expected, rtol=1e-5, atol=1e-5)


def test_no_global_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    predictor_tokens(**_inputs())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shared", [False, True])
def test_variance_of_the_noised_query_per_level(shared: bool) -> None:
    """T7: Var(q - mask - psi) = sigma_k^2 at every level."""
    samples, targets, width = 48, 24, 96
    levels = torch.tensor([0.05, 0.215, 0.716, 2.0])
    pos, mask_token = torch.randn(36, width), torch.randn(width)
    order = torch.stack([torch.randperm(4) for _ in range(samples)])
    target_idx = torch.rand(samples, 4, 36).argsort(-1)[..., :targets]
    sigma = levels[order]
    out = predictor_tokens(
        torch.zeros(samples, 0, width),
        pos,
        mask_token,
        torch.zeros(samples, 0, dtype=torch.int64),
        target_idx,
        sigma,
        NoiseKey(3, 9, torch.arange(samples), shared),
    )
    query = out.view(4, samples, targets, width).transpose(0, 1) - mask_token
    residual = query - pos[target_idx]
    for k, level in enumerate(levels):
        draws = residual[order == k]
        count = draws.numel()
        assert count == samples * targets * width
        assert abs(draws.mean() / level) < 5 / math.sqrt(count)
        assert abs(draws.var() / level**2 - 1) < 5 * math.sqrt(2 / count)


def test_blocks_and_samples_can_be_permuted_or_split() -> None:
    inputs = _inputs()
    whole = predictor_tokens(**inputs).view(M, B, KC + KT, WIDTH)
    for rows in (torch.tensor([2, 0, 1]), *torch.arange(B).split(1)):
        some = {k: inputs[k][rows] for k in ("context", "context_idx", "target_idx", "sigma")}
        some["noise"] = NoiseKey(11, 5, IDS[rows])
        part = predictor_tokens(**(inputs | some)).view(M, len(rows), KC + KT, WIDTH)
        assert torch.equal(part, whole[:, rows])


def test_context_gradient_is_the_sum_over_blocks() -> None:
    inputs = _inputs() | {"sigma": None}
    inputs["context"] = inputs["context"].bfloat16().requires_grad_()
    out = predictor_tokens(**inputs)
    cotangent = torch.randint(-8, 9, out.shape).to(out)
    (grad,) = torch.autograd.grad(out, inputs["context"], cotangent)
    assert torch.equal(grad, cotangent.view(M, B, KC + KT, WIDTH)[:, :, :KC].sum(0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"context": torch.zeros(B, WIDTH)}, ValueError, "predictor_tokens: context must be [B,Kc"),
        ({"pos": torch.zeros(N, 9)}, ValueError, "pos must be [N,d] = [any, 10], got [16, 9]"),
        ({"mask_token": torch.zeros(1, 1, 10)}, ValueError, "mask_token must be [d] = [10], got"),
        (
            {"context_idx": torch.zeros(B, 4, dtype=torch.int64)},
            ValueError,
            "context_idx must be [B,Kc] = [3, 5], got [3, 4]",
        ),
        (
            {"context_idx": torch.full((B, KC), 16)},
            ValueError,
            "context_idx must be int64 in [0, 16",
        ),
        (
            {"target_idx": torch.full((B, M, KT), -3)},
            ValueError,
            "target_idx must be int64 in [0, 16), got -3",
        ),
        ({"target_idx": torch.zeros(B, M, KT)}, TypeError, "target_idx must be int64, got float32"),
        ({"sigma": 0.5}, TypeError, "sigma must be a torch.Tensor [B,M], got float"),
        ({"sigma": torch.zeros(B)}, ValueError, "sigma must be [B,M] = [3, 2], got [3]"),
        ({"sigma": torch.zeros(B, M, KT)}, ValueError, "= [3, 2], got [3, 2, 4]"),
        ({"sigma": torch.zeros(B, M).half()}, TypeError, "sigma must be float32 or float64, got"),
        (
            {"noise": None},
            ValueError,
            "sigma needs noise, a NoiseKey(seed, step, sample_ids); got sigma and noise=None",
        ),
        (
            {"noise": NoiseKey(1, 2, IDS[:2]), "sigma": None},
            ValueError,
            "noise.sample_ids must be [B] = [3], got [2]",
        ),
        (
            {"noise": (11, 5, IDS)},
            TypeError,
            "noise must be a NoiseKey(seed, step, sample_ids, shared=False), got tuple",
        ),
        (
            {"noise": IDS},
            TypeError,
            "noise must be a NoiseKey(seed, step, sample_ids, shared=False",
        ),
        ({"noise": NoiseKey(1.0, 2, IDS)}, TypeError, "noise.seed must be an int, got float"),
        (
            {"noise": NoiseKey(1, 2.0, IDS)},
            TypeError,
            "noise.step must be an int or an int64 tensor, got float",
        ),
        ({"noise": NoiseKey(1, IDS.float()[0], IDS)}, TypeError, "noise.step must be int64"),
        ({"noise": NoiseKey(1, IDS, IDS)}, ValueError, "noise.step must be []"),
        ({"noise": NoiseKey(1, 2, IDS, 1)}, TypeError, "noise.shared must be a bool, got int"),
        (
            {"noise": NoiseKey(1, 2, [1, 2, 3])},
            TypeError,
            "noise.sample_ids must be a torch.Tensor",
        ),
        ({"impl": "triton"}, RuntimeError, "predictor_tokens: impl='triton' cannot run on cpu"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        predictor_tokens(**(_inputs() | change))
