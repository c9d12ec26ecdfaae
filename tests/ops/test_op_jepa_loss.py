"""jepa_loss against scalar loops and against the published computation, bit for bit."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from njepa_kernels import JepaLoss, jepa_loss
from torch.nn import functional as F

from tests.support.loss_inputs import (
    KT,
    B,
    D,
    M,
    N,
    each_impl,
    gradients_of,
    leaves_of,
    make_inputs,
)


def _published(pred: torch.Tensor, h: torch.Tensor, target_idx: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(h, (h.size(-1),))
    masks = [target_idx[:, m] for m in range(target_idx.shape[1])]
    picked = [torch.gather(normed, 1, m[..., None].repeat(1, 1, h.size(-1))) for m in masks]
    return F.smooth_l1_loss(pred, torch.cat(picked, dim=0))


# Values


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, 2.5])
def test_against_scalar_loops(beta: float) -> None:
    inputs = make_inputs(torch.float64, two=True)
    clean = noise = distance = 0.0
    for b in range(B):
        for m in range(M):
            for t in range(KT):
                row = inputs["h"][b, inputs["target_idx"][b, m, t]].tolist()
                mean = sum(row) / D
                root = math.sqrt(sum((v - mean) ** 2 for v in row) / D + 1e-5)
                for c in range(D):
                    y = (row[c] - mean) / root
                    p, q = (float(inputs[n][m * B + b, t, c]) for n in ("pred", "noised"))
                    s = [
                        e * e / (2 * beta) if e < beta else e - beta / 2
                        for e in (abs(p - y), abs(q - y))
                    ]
                    clean += s[0] / (B * M * KT * D)
                    noise += s[1] / (B * M * KT * D)
                    distance += (p - q) ** 2 / (B * M * KT * D)
    weights = {"noise_weight": 0.7, "consistency": 0.3, "beta": beta}
    result = jepa_loss(**inputs, **weights)
    expected = (clean + 0.7 * noise + 0.3 * distance, clean, noise, distance)
    assert [float(v.detach()) for v in result] == pytest.approx(expected, rel=1e-12)
    alone = jepa_loss(**(inputs | {"noised": None}), **weights)
    assert float(alone.loss) == float(alone.clean) == pytest.approx(clean, rel=1e-12)
    assert alone[2:] == (None, None)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 197, 100), (8, 4, 33, 196, 192), (5, 3, 7, 64, 384)], ids=str
)
def test_bits_of_the_published_loss_and_gradient(shape: tuple[int, ...]) -> None:
    b, m, kt, n, d = shape
    pred = torch.randn(m * b, kt, d, requires_grad=True)
    h = torch.randn(b, n, d) * 3 + 1
    target_idx = torch.rand(b * m, n).argsort(1)[:, :kt].view(b, m, kt)
    ours = jepa_loss(pred, h, target_idx, impl="reference").loss
    theirs = _published(pred, h, target_idx)
    assert torch.equal(ours, theirs)
    (d_ours,) = torch.autograd.grad(ours, pred)
    (d_theirs,) = torch.autograd.grad(theirs, pred)
    assert torch.equal(d_ours, d_theirs)


@each_impl
def test_terms_are_detached_and_only_the_loss_is_not(impl: Any) -> None:
    inputs = make_inputs(two=True)
    leaves_of(inputs)
    for given in (inputs, inputs | {"noised": None}):
        result = jepa_loss(**given, impl=impl)
        assert isinstance(result, JepaLoss)
        assert [t.requires_grad for t in result if t is not None] == [True] + [False] * (
            3 if given["noised"] is not None else 1
        )
        assert all(t.dtype == torch.float32 and t.dim() == 0 for t in result if t is not None)


# Properties


@each_impl
def test_the_predictions_may_change_places(impl: Any) -> None:
    inputs = make_inputs(two=True)
    turned = inputs | {"pred": inputs["noised"], "noised": inputs["pred"]}
    options = {"noise_weight": 1.0, "consistency": 0.4, "impl": impl}
    one, other = jepa_loss(**inputs, **options), jepa_loss(**turned, **options)
    torch.testing.assert_close(one.loss, other.loss)
    for a, b in ((one.clean, other.noised), (one.noised, other.clean)):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(one.consistency, other.consistency)
    sides = ("clean", "noised")
    for stop, reverse in (("none", "none"), sides, sides[::-1]):
        dpred, dnoised = gradients_of(inputs, **options, consistency_stop=stop)
        turned_noised, turned_pred = gradients_of(turned, **options, consistency_stop=reverse)
        torch.testing.assert_close(dpred, turned_pred)
        torch.testing.assert_close(dnoised, turned_noised)


@each_impl
def test_equal_predictions_are_consistent(impl: Any) -> None:
    inputs = make_inputs(two=True)
    inputs["noised"] = inputs["pred"].clone()
    result = jepa_loss(**inputs, noise_weight=1.0, consistency=50.0, impl=impl)
    assert float(result.consistency) == 0.0
    torch.testing.assert_close(result.loss, 2 * result.clean)
    dpred, dnoised = gradients_of(inputs, noise_weight=1.0, consistency=50.0, impl=impl)
    assert torch.equal(dpred, dnoised)


@each_impl
def test_without_consistency_it_is_the_sum_of_two_losses(impl: Any) -> None:
    inputs = make_inputs(two=True)
    single = {name: inputs[name] for name in ("pred", "h", "target_idx")}
    second = single | {"pred": inputs["noised"]}
    options = {"noise_weight": 0.25, "consistency": 0.0, "impl": impl}
    result = jepa_loss(**inputs, **options)
    clean, noise = (jepa_loss(**one, impl=impl).loss for one in (single, second))
    torch.testing.assert_close(result.loss, clean + 0.25 * noise)
    got = gradients_of(inputs, **options)
    torch.testing.assert_close(got[0], *gradients_of(single, impl=impl))
    torch.testing.assert_close(got[1], 0.25 * gradients_of(second, impl=impl)[0])


@each_impl
def test_a_stopped_side_gets_the_gradient_of_its_own_term_alone(impl: Any) -> None:
    inputs = make_inputs(two=True)
    options = {"noise_weight": 0.5, "consistency": 2.0, "impl": impl}
    both = gradients_of(inputs, **options)
    none = gradients_of(inputs, **(options | {"consistency": 0.0}))
    values = jepa_loss(**inputs, **options)
    for stop, want in (("clean", (none[0], both[1])), ("noised", (both[0], none[1]))):
        for got, expected in zip(
            gradients_of(inputs, **options, consistency_stop=stop), want, strict=True
        ):
            torch.testing.assert_close(got, expected)
        stopped = jepa_loss(**inputs, **options, consistency_stop=stop)
        assert all(torch.equal(a, b) for a, b in zip(stopped, values, strict=True))
    pull = 2 * 2.0 * (inputs["pred"] - inputs["noised"]) / inputs["pred"].numel()
    torch.testing.assert_close(both[0] - none[0], pull, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(both[1] - none[1], -pull, rtol=1e-4, atol=1e-7)


def test_targets_get_no_gradient() -> None:
    inputs = make_inputs(two=True)
    h = inputs["h"].requires_grad_()
    pred, noised = leaves_of(inputs)
    jepa_loss(**inputs).loss.backward()
    assert h.grad is None
    assert pred.grad is not None
    assert noised.grad is not None


@each_impl
def test_only_one_of_the_predictions_may_require_a_gradient(impl: Any) -> None:
    inputs = make_inputs(two=True)
    both = gradients_of(inputs, impl=impl)
    for i, name in enumerate(("pred", "noised")):
        given = inputs | {name: inputs[name].clone().requires_grad_()}
        loss = jepa_loss(**given, impl=impl).loss
        (got,) = torch.autograd.grad(loss, [given[name]])
        assert torch.equal(got, both[i])


def test_shift_and_scale_of_the_targets_do_not_matter() -> None:
    inputs = make_inputs(torch.float64, two=True)
    moved = inputs | {"h": inputs["h"] * 50.0 - 4.0}
    first = jepa_loss(**inputs, eps=1e-12).loss
    torch.testing.assert_close(first, jepa_loss(**moved, eps=1e-12).loss)


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_summed_in_fp32(dtype: torch.dtype, impl: Any) -> None:
    inputs = make_inputs(dtype, two=True)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    result, expected = jepa_loss(**inputs, impl=impl), jepa_loss(**wide, impl=impl)
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(jepa_loss(**wide, impl=impl).loss, expected.loss)


# Arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"pred": torch.zeros(B, M, KT, D)},
            ValueError,
            "jepa_loss: pred must be [M*B,Kt,D] = [6, 4, 6], got [3, 2, 4, 6]",
        ),
        ({"pred": torch.zeros(B, KT, D)}, ValueError, "= [6, 4, 6], got [3, 4, 6]"),
        ({"h": torch.zeros(B, N)}, ValueError, "h must be [B,N,D]"),
        (
            {"target_idx": torch.full((B, M, KT), 9)},
            ValueError,
            "target_idx must be int64 in [0, 9)",
        ),
        ({"target_idx": torch.zeros(B, KT).long()}, ValueError, "target_idx must be [B,M,Kt]"),
        (
            {"noised": torch.zeros(B, KT, D)},
            ValueError,
            "jepa_loss: noised must be [*,*,*] = [6, 4, 6], got [3, 4, 6]",
        ),
        ({"noised": 2.0}, TypeError, "noised must be a torch.Tensor"),
        (
            {"noised": torch.zeros(M * B, KT, D).bfloat16()},
            TypeError,
            "noised must be float32, got bfloat16",
        ),
        ({"noise_weight": -0.5}, ValueError, "noise_weight must be at least 0, got -0.5"),
        ({"consistency": float("nan")}, ValueError, "consistency must be at least 0, got nan"),
        (
            {"consistency_stop": "pred"},
            ValueError,
            "consistency_stop must be none, clean or noised, got 'pred'",
        ),
        ({"beta": -1.0}, ValueError, "beta must be at least 0, got -1.0"),
        ({"beta": float("nan")}, ValueError, "beta must be at least 0, got nan"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        ({"impl": "triton"}, RuntimeError, "jepa_loss: impl='triton' cannot run"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        jepa_loss(**(make_inputs() | change))
