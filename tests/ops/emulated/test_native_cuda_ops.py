"""The CUDA kernels, emulated: noise, tokens, losses and averages, each with its own promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from njepa_kernels import NoiseKey, philox_normal
from njepa_kernels.ops.ema_update_ import native as ema_native
from njepa_kernels.ops.ema_update_.op import host_rates
from njepa_kernels.ops.ema_update_.reference import ema_update_reference_
from njepa_kernels.ops.jepa_loss import native as loss_native
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.jepa_loss.reference import jepa_loss_reference
from njepa_kernels.ops.predictor_tokens import native as predictor_native
from njepa_kernels.ops.predictor_tokens.cases import _case as predictor_case
from njepa_kernels.testing import assert_within_baseline, cast_inputs, evaluate

from tests.support.emulated_cuda import CPU, MARKS, each_dtype, ops
from tests.support.native_adapters import NATIVE
from tests.support.noise_checks import check_draws, noise_of

pytestmark = MARKS


def test_noise_equals_the_reference() -> None:
    """10^6 draws within 1e-6: without context, position and mask token only the noise is left."""
    d, worst = 6_173, 0.0
    ids = torch.tensor([5, 2**32 - 1, 2**40 + 3])
    patches = torch.arange(9).view(1, 1, 9).repeat(3, 2, 1) * 30
    zeros = torch.zeros(9 * 30, d)
    for seed, step in ((7, 0), (2**32 - 1, 2**31), (-4, 2**35 + 1)):
        key = NoiseKey(seed, step, ids)
        got = predictor_native.forward(
            torch.zeros(3, 0, d),
            zeros,
            zeros[0],
            torch.zeros(3, 0, dtype=torch.int64),
            patches,
            torch.ones(3, 2),
            key,
        )
        expected = philox_normal(key, patches, d).transpose(0, 1)
        again = predictor_native.forward(
            torch.zeros(3, 0, d),
            zeros,
            zeros[0],
            torch.zeros(3, 0, dtype=torch.int64),
            patches,
            torch.ones(3, 2),
            key._replace(step=torch.tensor(step)),
        )
        assert torch.equal(again, got)
        worst = max(worst, float((got.view(2, 3, 9, d) - expected).abs().max()))
    assert 0.0 < worst <= 1e-6


def test_draws_per_block_and_shared() -> None:
    check_draws(noise_of(NATIVE["predictor_tokens"]))


def test_frozen_positions_make_no_table() -> None:
    """What a backward allocates: without need_pos nothing of the size of the table."""
    n, d = 4096, 64
    idx = torch.randint(0, n, (1, 2, 3))
    rest = (idx[:, 0], idx, NoiseKey(7, 1, torch.arange(1)), n)
    for need_pos in (False, True):
        with torch.profiler.profile(profile_memory=True) as profile:
            dpos = predictor_native.backward(torch.randn(2, 6, d), *rest, need_pos, True)[2]
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert (dpos is not None) == need_pos
        assert largest >= 4 * n * d if need_pos else largest < n * d


@each_dtype
def test_sigma_zero_is_no_noise_bit_for_bit(dtype: torch.dtype) -> None:
    case = predictor_case("zero", 3, 2, 5, 4, 16, 50)
    inputs = case.make_inputs(CPU, dtype, 1)
    zero, none = (
        NATIVE["predictor_tokens"](**(inputs | {"sigma": sigma}))
        for sigma in (torch.zeros(3, 2), None)
    )
    assert torch.equal(zero, none)


@each_dtype
def test_all_tokens_from_one_patch(dtype: torch.dtype) -> None:
    case = predictor_case("one", 3, 2, 35, 33, 40, 16)
    inputs = case.make_inputs(CPU, dtype, 0)
    for name in ("context_idx", "target_idx"):
        inputs[name] = torch.full_like(inputs[name], 39)
    exact = evaluate(case, case.reference, cast_inputs(inputs, torch.float64))
    eager = evaluate(case, case.eager, inputs)
    for name, value in evaluate(case, NATIVE["predictor_tokens"], inputs).items():
        assert_within_baseline(value, eager[name], exact[name], value.dtype, name)


def loss_forward(pred: torch.Tensor, h: torch.Tensor, idx: torch.Tensor, **change: Any) -> Any:
    numbers = {
        **{"noised": None, "noise_weight": 1.0, "consistency": 1.0, "beta": 1.0, "eps": 1e-5},
        **{"scale": 1.0, "pull_pred": 0.0, "pull_noised": 0.0},
        **{"need_pred": True, "need_noised": "noised" in change},
    }
    return loss_native.forward(pred, h, idx, **(numbers | change))


def test_features_of_another_type_than_the_predictions() -> None:
    case = loss_case("mixed", 2, 2, 3, 9, 40, noised=True)
    for pred_type, h_type in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        inputs = case.make_inputs(CPU, pred_type, 0)
        h, idx = inputs["h"].to(h_type), inputs["target_idx"]
        loss, terms, *_ = loss_forward(inputs["pred"], h, idx, noised=inputs["noised"])
        wide = (inputs[name].double() for name in ("pred", "noised"))
        pred, noised = wide
        expected = jepa_loss_reference(
            pred, h.double(), idx, noised, noise_weight=1.0, consistency=1.0
        )
        torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-6, atol=0)
        for got, want in zip(terms, expected[1:], strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_nan_and_infinity_reach_loss_and_slope() -> None:
    case = loss_case("bad", 1, 1, 4, 9, 40, noised=True)
    for beta in (0.0, 1.0):
        inputs = case.make_inputs(CPU, torch.float32, 0)
        clean, h, idx = (inputs[name] for name in ("pred", "h", "target_idx"))
        pred = clean.clone()
        pred[0, 1, 3] = float("nan")
        pred[0, 2, 4] = float("inf")
        bad = h.clone()
        bad[0, idx[0, 0, 3], 5] = float("nan")
        loss, _, slope, _ = loss_forward(pred, bad, idx, beta=beta)
        assert loss.isnan()
        assert slope.isnan().sum(-1).tolist() == [[0, 1, 0, 40]]
        assert slope[0, 2, 4] == 1.0
        pred[0, 1, 3] = 0.0
        assert loss_forward(pred, h, idx, beta=beta)[0] == float("inf")

        # One bad prediction spoils the gradient of the other where the consistency term links them.
        pred[0, 1, 3] = float("nan")
        for pull, reached in ((0.25, 1), (0.0, 0)):
            _, terms, dclean, dbad = loss_forward(
                clean, h, idx, noised=pred, beta=beta, pull_pred=pull, pull_noised=0.25
            )
            assert terms.isfinite().tolist() == [True, False, False]
            assert int(dclean.isnan().sum()) == reached
            assert dbad.isnan().sum(-1).tolist() == [[0, 1, 0, 0]]


@each_dtype
def test_only_the_slopes_asked_for_are_written(dtype: torch.dtype) -> None:
    inputs = loss_case("need", 2, 2, 3, 9, 40, noised=True).make_inputs(CPU, dtype, 0)
    args = inputs["pred"], inputs["h"], inputs["target_idx"]
    both = loss_forward(*args, noised=inputs["noised"], pull_pred=0.5)
    for need in ((True, False), (False, True), (False, False)):
        got = loss_forward(
            *args, noised=inputs["noised"], pull_pred=0.5, need_pred=need[0], need_noised=need[1]
        )
        for i, needed in enumerate((True, True, *need)):
            assert torch.equal(got[i], both[i]) if needed else got[i].numel() == 0


def test_scaling_by_one_in_place_touches_nothing() -> None:
    """Neither side of a NaN's payload is kept by a multiplication in bf16; left alone, it is."""
    odd = torch.tensor([0x7F81, 0x3F80], dtype=torch.int16).view(torch.bfloat16)
    slope = odd.repeat(4)
    loss_native.backward(torch.tensor(2.0), [slope], [slope], 0.5)
    assert torch.equal(slope.view(torch.int16), odd.repeat(4).view(torch.int16))
    out = torch.empty_like(slope)
    loss_native.backward(torch.tensor(2.0), [slope], [out], 0.5)
    assert not torch.equal(out.view(torch.int16), slope.view(torch.int16))


def _lists(
    sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    targets = [torch.randn(size) for size in sizes]
    sources = [torch.randn(n).to(dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
    return targets, sources, [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]


@pytest.mark.parametrize("momentum", [0.996, 0.0, 1.0, torch.tensor(0.9, dtype=torch.float64)])
def test_ema_has_the_bits_of_two_roundings_for_many_tensors_of_all_types(
    momentum: float | torch.Tensor,
) -> None:
    # More tensors of a type than a table holds, empty ones, whole chunks, and odd ends.
    sizes = [1, 0, 7, 8, 4096, 4097, 12288, 100, *[3] * 320]
    targets, sources, shadow = _lists(sizes, [torch.float32, torch.bfloat16, torch.float16])
    m = float(momentum)
    kept = [(target * m).double() for target in targets]
    rest = float(torch.tensor(1.0 - m, dtype=torch.float32))
    # The product of two fp32 is exact in fp64: what remains is the one rounding of an FMA.
    expected = [(k + rest * s.double()).float() for k, s in zip(kept, sources, strict=True)]
    rates = host_rates(momentum, torch.device("cuda"))
    ema_native._update_cuda(targets, sources, *rates, shadow)
    for got, want, low in zip(targets, expected, shadow, strict=True):
        torch.testing.assert_close(got, want, rtol=1.2e-7, atol=0)
        assert torch.equal(low, got.bfloat16())


def test_ema_rates_on_the_device_equal_numbers() -> None:
    targets, sources, _ = _lists([5, 5000], [torch.bfloat16])
    copies = [target.clone() for target in targets]
    ops().ema_update_(targets, sources, 0.0, 0.0, torch.tensor([0.75, 0.25]), [])
    ops().ema_update_(copies, sources, 0.75, 0.25, None, [])
    assert all(torch.equal(a, b) for a, b in zip(targets, copies, strict=True))
    expected = [target.clone() for target in copies]
    ema_update_reference_(expected, sources, 0.75)
    ops().ema_update_(copies, sources, 0.75, 0.25, None, [])
    for got, want in zip(copies, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1.2e-7, atol=1e-7)
