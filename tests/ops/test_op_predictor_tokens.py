"""predictor_tokens against loops; the noise against what method T3 and T7 ask of it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from njepa_kernels import philox_normal, predictor_tokens

B, M, KC, KT, N, WIDTH = 3, 2, 5, 4, 16, 10


def _inputs(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "context": torch.randn(B, KC, WIDTH, generator=g),
        "pos": torch.randn(N, WIDTH, generator=g),
        "mask_token": torch.randn(WIDTH, generator=g),
        "context_idx": torch.randint(0, N, (B, KC), generator=g),
        "target_idx": torch.randint(0, N, (B, M, KT), generator=g),
        "sigma": torch.rand(B, M, generator=g) * 2,
        "seed": 11,
        "step": 5,
        "sample_ids": torch.tensor([40, 2, 7]),
    }


def _loop(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    noise: torch.Tensor,
    mix: str,
) -> torch.Tensor:
    """Row after row, token after token, in the published order (block-major)."""
    rows = []
    for m in range(target_idx.shape[1]):
        for b in range(target_idx.shape[0]):
            tokens = [context[b, i] + pos[j] for i, j in enumerate(context_idx[b].tolist())]
            for t, j in enumerate(target_idx[b, m].tolist()):
                psi = pos[j]
                if sigma is not None:
                    s = sigma[b, m] if sigma.dim() == 2 else sigma[b, m, t]
                    scale = {
                        "ve": torch.ones(()),
                        "vp": 1 / torch.sqrt(1 + s**2),
                        "edm": math.sqrt(0.5) / torch.sqrt(s**2 + 0.5),
                    }[mix]
                    psi = scale * (psi + s * noise[b, m, t])
                tokens.append(mask_token + psi)
            rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("mix", ["ve", "vp", "edm"])
@pytest.mark.parametrize("level", [None, "block", "token"])
def test_values_and_gradients_against_the_loop(mix: str, level: str | None) -> None:
    inputs = _inputs()
    if level is None:
        inputs["sigma"] = None
    elif level == "token":
        inputs["sigma"] = torch.rand(B, M, KT) * 2
    names = [n for n in ("context", "pos", "mask_token", "sigma") if inputs[n] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]
    noise = philox_normal(11, 5, inputs["sample_ids"], inputs["target_idx"], WIDTH)
    out = predictor_tokens(**inputs, mix=mix)
    arrays = {k: inputs[k] for k in ("context", "pos", "mask_token", "context_idx", "target_idx")}
    expected = _loop(**arrays, sigma=inputs["sigma"], noise=noise, mix=mix)
    assert out.shape == (M * B, KC + KT, WIDTH)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    for name, got, want in zip(names, grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", ["ve", "vp", "edm"])
def test_sigma_zero_is_no_noise_bit_for_bit(mix: str, dtype: torch.dtype) -> None:
    inputs = _inputs()
    inputs["context"] = inputs["context"].to(dtype)
    inputs["sigma"] = None
    clean = predictor_tokens(**inputs)
    for shape in ((B, M), (B, M, KT)):
        inputs["sigma"] = torch.zeros(shape)
        assert torch.equal(predictor_tokens(**inputs, mix=mix), clean)
    assert clean.dtype == dtype


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
    noise = philox_normal(11, 5, inputs["sample_ids"], inputs["target_idx"], WIDTH)
    torch.testing.assert_close(inputs["sigma"].grad, noise.sum((2, 3)), rtol=1e-5, atol=1e-5)


def test_no_global_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    predictor_tokens(**_inputs())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mix", ["ve", "vp", "edm"])
def test_variance_of_the_noised_query_per_level(mix: str) -> None:
    """T7: Var(q - mask - psi) = sigma_k^2 at every level (scaled back for vp and edm)."""
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
        3,
        9,
        torch.arange(samples),
        mix,  # type: ignore[arg-type]
    )
    query = out.view(4, samples, targets, width).transpose(0, 1) - mask_token
    s = sigma[..., None, None]
    scale = {"ve": s * 0 + 1, "vp": (1 + s**2).sqrt(), "edm": (s**2 + 0.5).sqrt() / 0.5**0.5}[mix]
    residual = query * scale - pos[target_idx]
    for k, level in enumerate(levels):
        draws = residual[order == k]
        count = draws.numel()
        assert count == samples * targets * width
        assert abs(draws.mean() / level) < 5 / math.sqrt(count)
        assert abs(draws.var() / level**2 - 1) < 5 * math.sqrt(2 / count)


def test_blocks_and_samples_can_be_permuted_or_split() -> None:
    inputs = _inputs()
    whole = predictor_tokens(**inputs).view(M, B, KC + KT, WIDTH)
    per_sample = ("context", "context_idx", "target_idx", "sigma", "sample_ids")
    order = torch.tensor([2, 0, 1])
    permuted = predictor_tokens(**(inputs | {k: inputs[k][order] for k in per_sample}))
    assert torch.equal(permuted.view(M, B, KC + KT, WIDTH), whole[:, order])
    for b in range(B):
        alone = predictor_tokens(**(inputs | {k: inputs[k][b : b + 1] for k in per_sample}))
        assert torch.equal(alone, whole[:, b])


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
        ({"sigma": 0.5}, TypeError, "sigma must be a torch.Tensor [B,M] or [B,M,Kt], got float"),
        (
            {"sigma": torch.zeros(B)},
            ValueError,
            "sigma must be [B,M] or [B,M,Kt] = [3, 2], got [3]",
        ),
        ({"sigma": torch.zeros(B, M, 1)}, ValueError, "= [3, 2, 4], got [3, 2, 1]"),
        ({"sigma": torch.zeros(B, M).half()}, TypeError, "sigma must be float32 or float64, got"),
        ({"sample_ids": None}, ValueError, "sample_ids (int64 [B]) must be given with sigma"),
        (
            {"sample_ids": torch.zeros(2).long()},
            ValueError,
            "sample_ids must be [B] = [3], got [2]",
        ),
        ({"mix": "vpp"}, ValueError, "mix must be one of ve, vp, edm, got 'vpp'"),
        ({"impl": "triton"}, RuntimeError, "predictor_tokens: impl='triton' cannot run on cpu"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        predictor_tokens(**(_inputs() | change))
