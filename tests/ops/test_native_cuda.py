"""The CUDA kernels (csrc/cuda) without a GPU: their source, compiled for the CPU by an emulation.

The emulation (cuda_emulation/) runs every thread of every block, with barriers and shuffles; the
host code, which chooses grids, chunks and the way of access, is the real one on CPU tensors.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import native_build
import pytest
import torch
from native_adapters import NATIVE
from njepa_kernels import NoiseKey, _native, philox_normal
from njepa_kernels.ema_update_ import native as ema_native
from njepa_kernels.ema_update_.reference import ema_update_reference_
from njepa_kernels.jepa_loss import native as loss_native
from njepa_kernels.jepa_loss.cases import _case as loss_case
from njepa_kernels.jepa_loss.reference import jepa_loss_reference
from njepa_kernels.predictor_tokens import native as predictor_native
from njepa_kernels.predictor_tokens.cases import _case as predictor_case
from njepa_kernels.testing import (
    OpCase,
    all_cases,
    assert_case_within_baseline,
    assert_within_baseline,
    cast_inputs,
    evaluate,
)
from noise_checks import check_draws, noise_of

pytestmark = pytest.mark.skipif(
    native_build.no_compiler() is not None, reason="there is no C++ compiler"
)

CPU = torch.device("cpu")
SEEDS = range(2)

CASES = [
    *(case for op in _native.CUDA_OPS for case in all_cases(op, small=True)),
    # Widths around those of a group, a warp and a tile; tokens and blocks of none and one.
    *(predictor_case(f"b2-m2-kc3-kt2-n9-d{d}", 2, 2, 3, 2, 9, d) for d in (1, 5, 256, 520, 2048)),
    predictor_case("b2-m2-kc3-kt2-n9-d272-shared", 2, 2, 3, 2, 9, 272, noise="shared"),
    predictor_case("b2-m2-kc0-kt3", 2, 2, 0, 3, 9, 20),
    predictor_case("b2-m2-kc3-kt0", 2, 2, 3, 0, 9, 24),
    # A row per warp, per 128 threads and per 512.
    *(
        loss_case(f"b2-m2-kt2-n9-d{d}", 2, 2, 2, 9, d)
        for d in (1, 15, 384, 512, 513, 1024, 2048, 2100, 2304)
    ),
    *(
        loss_case(f"b2-m2-kt2-n9-d{d}-noised", 2, 2, 2, 9, d, noised=True)
        for d in (1, 384, 513, 2304)
    ),
    # More blocks of rows than the last kernel has threads, and a last block of three rows.
    loss_case("b3-m29-kt25-n30-d8-noised", 3, 29, 25, 30, 8, noised=True),
]
#: Chunks of two samples for dpos, two stages for dmask_token, more tokens than a warp has lanes.
CHUNKS = predictor_case("b5-m2-kc40-kt35-n2100-d8", 5, 2, 40, 35, 2100, 8)

each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16],
    ids=lambda d: str(d).removeprefix("torch."),
)


def _ops() -> Any:
    return torch.ops.njepa_native_emulated


@pytest.fixture(scope="module", autouse=True)
def _emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.ops.load_library(native_build.build_emulated_library(tmp_path_factory.mktemp("so")))
    with pytest.MonkeyPatch.context() as patch:
        for module in (predictor_native, loss_native, ema_native):
            patch.setattr(module, "ops", lambda device_type: _ops())
        patch.setattr(ema_native, "update", ema_native._update_cuda)
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _agree(case: OpCase, dtype: torch.dtype, seeds: range = SEEDS) -> None:
    got, base = assert_case_within_baseline(case, NATIVE[case.op], CPU, dtype, seeds)
    for name, value in got.items():
        assert value.dtype == base[name].dtype


def test_the_emulation_sees_missing_and_divergent_barriers(tmp_path: Path) -> None:
    program = tmp_path / "check"
    native_build.compile_emulated(str(native_build.EMULATION / "check.cpp"), "-o", str(program))
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "0 wrong, missing barrier seen\n")


@each_dtype
@pytest.mark.parametrize("op", _native.CUDA_OPS)
def test_values_and_gradients_are_within_the_baseline(op: str, dtype: torch.dtype) -> None:
    for case in CASES:
        if case.op == op:
            _agree(case, dtype)


def test_many_samples_and_patches_are_within_the_baseline() -> None:
    _agree(CHUNKS, torch.float32, range(1))


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], what: str) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(7.0), second[name].nan_to_num(7.0)), (what, name)


def test_both_orders_of_threads_give_the_same_bits() -> None:
    # An odd launch between the runs: whatever a run launches, a kernel goes forwards and backwards.
    scalar = torch.ones(())
    for case in CASES:
        inputs = case.make_inputs(CPU, torch.bfloat16, 3)
        runs = []
        for _ in range(3):
            runs.append(evaluate(case, NATIVE[case.op], inputs))
            _ops().jepa_loss_backward(scalar, [torch.ones(8)], [torch.ones(8)], 1.0)
        _same(runs[0], runs[1], case.name)
        _same(runs[0], runs[2], case.name)


def _shifted(value: Any) -> Any:
    """The same values, contiguous, on an address that is no multiple of 16."""
    if isinstance(value, list):
        return [_shifted(item) for item in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    room = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
    assert value.numel() == 0 or room.data_ptr() % 16 != 0
    return room.copy_(value)


@each_dtype
def test_addresses_that_are_not_aligned_give_the_same_bits(dtype: torch.dtype) -> None:
    cases = [
        predictor_case("d48", 2, 2, 3, 2, 9, 48),
        loss_case("d48", 2, 2, 3, 9, 48, noised=True),
    ]
    for case in cases:
        inputs = case.make_inputs(CPU, dtype, 4)
        shifted = {name: _shifted(value) for name, value in inputs.items()}
        # The functions straight, since the tests' own helper would copy to aligned memory.
        ours, theirs = (NATIVE[case.op](**given) for given in (inputs, shifted))
        if case.op == "predictor_tokens":
            assert torch.equal(ours, theirs)
            seed, step, ids, shared = inputs["noise"]
            rest = (inputs["context_idx"], inputs["target_idx"], ids, seed, step, shared, 9)
            for a, b in zip(
                predictor_native.backward(ours, *rest, True, True),
                predictor_native.backward(_shifted(ours), *rest, True, True),
                strict=True,
            ):
                assert torch.equal(a, b)
        else:
            assert torch.equal(ours.loss, theirs.loss)
            slopes = [inputs["pred"], inputs["pred"] + 1]
            moved = [_shifted(slope) for slope in slopes]
            out = [torch.empty_like(slope) for slope in slopes]
            loss_native.backward(torch.tensor(0.5), slopes, out, 0.25)
            loss_native.backward(torch.tensor(0.5), moved, moved, 0.25)
            for slope, given, in_place in zip(slopes, out, moved, strict=True):
                assert torch.equal(given, (slope.float() * 0.125).to(dtype))
                assert torch.equal(in_place, given)


def test_noise_equals_the_reference() -> None:
    """10^6 draws within 1e-6: without context, position and mask token only the noise is left."""
    d, worst = 6_173, 0.0
    ids = torch.tensor([5, 2**32 - 1, 2**40 + 3])
    patches = torch.arange(9).view(1, 1, 9).repeat(3, 2, 1) * 30
    zeros = torch.zeros(9 * 30, d)
    for seed, step in ((7, 0), (2**32 - 1, 2**31), (-4, 2**35 + 1)):
        got = predictor_native.forward(
            torch.zeros(3, 0, d),
            zeros,
            zeros[0],
            torch.zeros(3, 0, dtype=torch.int64),
            patches,
            torch.ones(3, 2),
            seed,
            step,
            ids,
            False,
        )
        expected = philox_normal(NoiseKey(seed, step, ids), patches, d).transpose(0, 1)
        worst = max(worst, float((got.view(2, 3, 9, d) - expected).abs().max()))
    assert 0.0 < worst <= 1e-6


def test_draws_per_block_and_shared() -> None:
    check_draws(noise_of(NATIVE["predictor_tokens"]))


def test_frozen_positions_make_no_table() -> None:
    """What a backward allocates: without need_pos nothing of the size of the table."""
    n, d = 4096, 64
    idx = torch.randint(0, n, (1, 2, 3))
    rest = (idx[:, 0], idx, torch.arange(1), 7, 1, False, n)
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


def _loss_forward(pred: torch.Tensor, h: torch.Tensor, idx: torch.Tensor, **change: Any) -> Any:
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
        loss, terms, *_ = _loss_forward(inputs["pred"], h, idx, noised=inputs["noised"])
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
        loss, _, slope, _ = _loss_forward(pred, bad, idx, beta=beta)
        assert loss.isnan()
        assert slope.isnan().sum(-1).tolist() == [[0, 1, 0, 40]]
        assert slope[0, 2, 4] == 1.0
        pred[0, 1, 3] = 0.0
        assert _loss_forward(pred, h, idx, beta=beta)[0] == float("inf")

        # One bad prediction spoils the gradient of the other where the consistency term links them.
        pred[0, 1, 3] = float("nan")
        for pull, reached in ((0.25, 1), (0.0, 0)):
            _, terms, dclean, dbad = _loss_forward(
                clean, h, idx, noised=pred, beta=beta, pull_pred=pull, pull_noised=0.25
            )
            assert terms.isfinite().tolist() == [True, False, False]
            assert int(dclean.isnan().sum()) == reached
            assert dbad.isnan().sum(-1).tolist() == [[0, 1, 0, 0]]


@each_dtype
def test_only_the_slopes_asked_for_are_written(dtype: torch.dtype) -> None:
    inputs = loss_case("need", 2, 2, 3, 9, 40, noised=True).make_inputs(CPU, dtype, 0)
    args = inputs["pred"], inputs["h"], inputs["target_idx"]
    both = _loss_forward(*args, noised=inputs["noised"], pull_pred=0.5)
    for need in ((True, False), (False, True), (False, False)):
        got = _loss_forward(
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
    ema_native._update_cuda(targets, sources, momentum, shadow)
    for got, want, low in zip(targets, expected, shadow, strict=True):
        torch.testing.assert_close(got, want, rtol=1.2e-7, atol=0)
        assert torch.equal(low, got.bfloat16())


def test_ema_rates_on_the_device_equal_numbers() -> None:
    targets, sources, _ = _lists([5, 5000], [torch.bfloat16])
    copies = [target.clone() for target in targets]
    _ops().ema_update_(targets, sources, 0.0, 0.0, torch.tensor([0.75, 0.25]), [])
    _ops().ema_update_(copies, sources, 0.75, 0.25, None, [])
    assert all(torch.equal(a, b) for a, b in zip(targets, copies, strict=True))
    expected = [target.clone() for target in copies]
    ema_update_reference_(expected, sources, 0.75)
    _ops().ema_update_(copies, sources, 0.75, 0.25, None, [])
    for got, want in zip(copies, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1.2e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("jepa_loss", {"h": torch.zeros(3, 36, 64).double()}, "h must be float32, bfloat16"),
        ("jepa_loss", {"pred": torch.zeros(12, 64, 6).mT}, "pred must be a contiguous"),
        ("jepa_loss", {"target_idx": torch.zeros(3, 4, 6).int()}, "target_idx must be int64"),
        (
            "jepa_loss",
            {"pred": torch.zeros(12, 6, 8193), "h": torch.zeros(3, 36, 8193)},
            "jepa_loss: the native CUDA kernel takes at most 8192 channels, got 8193",
        ),
        ("jepa_loss", {"noised": torch.zeros(12, 6, 63)}, "noised has a wrong shape"),
        ("jepa_loss", {"noised": torch.zeros(12, 6, 64).half()}, "must have the type of pred"),
        ("predictor_tokens", {"pos": torch.zeros(36, 47)}, "pos has a wrong shape"),
        ("predictor_tokens", {"sigma": torch.zeros(3, 4), "noise": None}, "sample_ids"),
        ("predictor_tokens", {"sigma": torch.zeros(3, 4, 6)}, "sigma has a wrong shape"),
        ("ema_update_", {"targets": [torch.zeros(3)] * 2}, "must be of one length"),
        ("ema_update_", {"targets": [torch.zeros(4)]}, "tensor 0: targets must be float32"),
    ],
)
def test_bad_arguments_raise(op: str, change: dict[str, Any], message: str) -> None:
    inputs = all_cases(op, small=True)[0].make_inputs(CPU, torch.float32, 0) | change
    run = partial(NATIVE[op], **inputs)
    if op == "ema_update_":
        lists = inputs["targets"], inputs["sources"][:1]
        run = partial(_ops().ema_update_, *lists, 0.5, 0.5, None, [])
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run()
