"""The CUDA kernels (csrc/cuda) without a GPU: their source, compiled for the CPU by an emulation.

The emulation (cuda_emulation/) runs every thread of every block, with barriers and shuffles; the
host code, which chooses grids, chunks and the way of access, is the real one on CPU tensors.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import native_build
import pytest
import torch
from native_adapters import NATIVE
from njepa_kernels import NoiseKey, philox_normal
from njepa_kernels._runtime import native
from njepa_kernels.ops.ema_update_ import native as ema_native
from njepa_kernels.ops.ema_update_.reference import ema_update_reference_
from njepa_kernels.ops.jepa_loss import native as loss_native
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.jepa_loss.reference import jepa_loss_reference
from njepa_kernels.ops.predictor_tokens import native as predictor_native
from njepa_kernels.ops.predictor_tokens.cases import _case as predictor_case
from njepa_kernels.testing import (
    OpCase,
    all_cases,
    assert_case_within_baseline,
    assert_within_baseline,
    cast_inputs,
    evaluate,
)
from noise_checks import check_draws, noise_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native_build.no_compiler() is not None, reason="there is no C++ compiler"),
]

CPU = torch.device("cpu")
SEEDS = range(2)

CASES = [
    *(case for op in native.CUDA_OPS for case in all_cases(op, small=True)),
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
#: More patches than a thread block sorts by, rows for three of them, more tokens than lanes.
CHUNKS = predictor_case("b5-m2-kc40-kt35-n2100-d8", 5, 2, 40, 35, 2100, 8)

each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16],
    ids=lambda d: str(d).removeprefix("torch."),
)


def _ops() -> Any:
    return torch.ops.njepa_native_emulated


class _Watch:
    """What the threads of a call touch: only its tensors, and what the call itself allocates."""

    library: ctypes.CDLL

    def __call__(self, call: Callable[..., Any], *args: Any) -> Any:
        self.library.watch_begin()
        for arg in args:
            for tensor in arg if isinstance(arg, list) else [arg]:
                if isinstance(tensor, torch.Tensor):
                    self.library.watch_allow(*self._memory(tensor))
        try:
            return call(*args)
        finally:
            self.library.watch_end()

    @staticmethod
    def _memory(tensor: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.c_uint64]:
        return ctypes.c_void_p(tensor.data_ptr()), ctypes.c_uint64(tensor.nbytes)

    def _number(self, name: str, *args: Any) -> int:
        function = getattr(self.library, name)
        function.restype = ctypes.c_uint64
        return int(function(*args))

    def outside(self) -> int:
        """Accesses outside of all tensors; they did not happen."""
        return self._number("watch_outside")

    def sectors(self) -> int:
        """Sectors of 32 bytes that the requests of warps moved."""
        return self._number("watch_sectors")

    def read(self, tensor: torch.Tensor) -> int:
        return self._number("watch_bytes", *self._memory(tensor), ctypes.c_bool(False))

    def everything(self) -> tuple[int, int]:
        """Bytes read and written in all tensors, in the order of the threads' requests."""
        whole = ctypes.c_void_p(0), ctypes.c_uint64(2**64 - 1)
        return tuple(self._number("watch_bytes", *whole, ctypes.c_bool(w)) for w in (False, True))


_watch = _Watch()


@pytest.fixture(scope="module", autouse=True)
def _emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = native_build.build_emulated_library(tmp_path_factory.mktemp("so"))
    torch.ops.load_library(path)
    _watch.library = ctypes.CDLL(str(path))
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
@pytest.mark.parametrize("op", native.CUDA_OPS)
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


def _predictor_calls(
    inputs: dict[str, Any], n: int
) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], list[torch.Tensor]]]:
    """Forward and backward of the library, watched."""
    inputs = inputs | {name: inputs[name].float() for name in ("pos", "mask_token")}
    names = "context", "pos", "mask_token", "context_idx", "target_idx", "sigma"
    indices = inputs["context_idx"], inputs["target_idx"]
    seed, step, ids, shared = inputs["noise"]

    def forward() -> torch.Tensor:
        tensors = [inputs[name] for name in names]
        out = _watch(_ops().predictor_tokens_forward, *tensors, seed, step, ids, shared)
        assert isinstance(out, torch.Tensor)
        return out

    def backward(grad: torch.Tensor) -> list[torch.Tensor]:
        need = inputs["sigma"] is not None
        rest = ids, seed, step, shared, n, True, need
        return list(_watch(_ops().predictor_tokens_backward, grad, *indices, *rest))

    return forward, backward


def _loss_call(inputs: dict[str, Any]) -> list[torch.Tensor]:
    tensors = [inputs[name] for name in ("pred", "h", "target_idx", "noised")]
    need = inputs["noised"] is not None
    numbers = (0.1, 0.1, 1.0, 1e-5, 1.0, 0.5, 0.5, True, need)
    return list(_watch(_ops().jepa_loss_forward, *tensors, *numbers))


@each_dtype
def test_no_thread_leaves_the_tensors(dtype: torch.dtype) -> None:
    """Empty batches, odd widths, addresses that are not aligned: nothing else is touched."""
    for case in CASES:
        for shift in (False, True):
            inputs = case.make_inputs(CPU, dtype, 5)
            if shift:
                inputs = {name: _shifted(value) for name, value in inputs.items()}
            if case.op == "predictor_tokens":
                forward, backward = _predictor_calls(inputs, inputs["pos"].shape[0])
                out = forward()
                assert _watch.outside() == 0, case.name
                backward(_shifted(out) if shift else out)
            elif case.op == "jepa_loss":
                slopes = [t for t in _loss_call(inputs)[2:] if t.numel()]
                assert _watch.outside() == 0, case.name
                if slopes:
                    _watch(_ops().jepa_loss_backward, torch.tensor(0.5), slopes, slopes, 1.0)
            else:
                lists = inputs["targets"], inputs["sources"]
                shadow = inputs["shadow"] or []
                rates = torch.tensor([0.75, 0.25])
                _watch(_ops().ema_update_, *lists, 0.0, 0.0, rates, shadow)
            assert _watch.outside() == 0, (case.name, shift)
            read, written = _watch.everything()
            assert (read + written > 0) == (case.size != "none"), case.name


def test_the_watch_sees_an_access_outside() -> None:
    pred, h = torch.ones(1, 1, 8), torch.ones(1, 1, 8)
    idx = torch.zeros(1, 1, 1, dtype=torch.int64)
    inputs = {"pred": pred, "h": h, "target_idx": idx, "noised": None}
    _loss_call(inputs)
    assert _watch.outside() == 0
    _watch(lambda *few: _ops().jepa_loss_backward(pred.sum(), *few, 1.0), [pred], [h])
    assert _watch.outside() == 256  # each reads the factor, of which the watch was not told


BAD = [-1, 9, 10, 2**31 + 3, 2**40, -(2**63), 2**63 - 1]


@each_dtype
@pytest.mark.parametrize("width", [48, 30])
def test_an_index_out_of_range_touches_nothing_and_gives_nan(
    dtype: torch.dtype, width: int
) -> None:
    """Without debug_checks: NaN where it is used, the bits of a good run everywhere else."""
    generator = torch.Generator().manual_seed(1)
    case = predictor_case("bad", 3, 2, 7, 7, 9, width)
    good = case.make_inputs(CPU, dtype, 1)
    bad = dict(good)
    context = torch.rand(3, 7, generator=generator) < 0.4
    target = torch.rand(3, 2, 7, generator=generator) < 0.4
    values = torch.tensor(BAD)
    for name, where in (("context_idx", context), ("target_idx", target)):
        assert 0 < int(where.sum()) < where.numel()
        bad[name] = torch.where(where, values.expand(where.shape), good[name])
    forward, backward = _predictor_calls(bad, 9)
    want, got = _predictor_calls(good, 9)[0](), forward()
    assert _watch.outside() == 0
    rows = torch.cat((context.expand(2, 3, 7), target.transpose(0, 1)), dim=2).flatten(0, 1)
    assert bool(got[rows].isnan().all())
    assert torch.equal(got[~rows], want[~rows])

    grad = want.clone()
    got_all = backward(grad)
    assert _watch.outside() == 0
    grad[rows] = 0.0
    # A row without a patch has no share in the table. The sums are split elsewhere.
    without = _predictor_calls(good, 9)[1](grad)[2]
    torch.testing.assert_close(got_all[2], without, rtol=1e-5, atol=1e-5)
    assert all(bool(t.isfinite().all()) for t in got_all)

    case = loss_case("bad", 3, 2, 7, 9, width, noised=True)
    good = case.make_inputs(CPU, dtype, 1)
    bad = good | {"target_idx": torch.where(target, values.expand(3, 2, 7), good["target_idx"])}
    want_all, got_all = _loss_call(good), _loss_call(bad)
    assert _watch.outside() == 0
    assert bool(got_all[0].isnan())
    rows = target.transpose(0, 1).flatten(0, 1)
    for got, want in zip(got_all[2:], want_all[2:], strict=True):
        assert bool(got[rows].isnan().all())
        assert torch.equal(got[~rows], want[~rows])


@each_dtype
def test_gradients_of_tokens_are_read_once_per_pass(dtype: torch.dtype) -> None:
    """Once for context, mask token and level, once for the table; the rest is small."""
    b, m, kc, kt, n, d = 5, 2, 40, 35, 60, 1032
    case = predictor_case("bytes", b, m, kc, kt, n, d)
    inputs = case.make_inputs(CPU, dtype, 1)
    grad = torch.randn(m * b, kc + kt, d).to(dtype)
    _predictor_calls(inputs, n)[1](grad)
    assert _watch.read(grad) == 2 * grad.nbytes
    read, written = _watch.everything()
    rows, tiles, pairs, chunks = m * b * (kc + kt), 3, b * m, 3
    dcontext = b * kc * d * dtype.itemsize
    counts = chunks * n * 4
    # Every thread reads what it needs of an index; a table of counts is read by all that sort.
    assert written == dcontext + (pairs + 1 + n) * d * 4 + pairs * tiles * 4 + (
        counts + (n + 1) * 4 + rows * 4
    )
    lanes = pairs * kt * 8 * 32 * tiles + pairs * 8 * 256 * tiles
    sorting = 2 * rows * 8 + chunks * counts
    placed = n * tiles * 256 * 2 * 4 + tiles * rows * 4
    assert read == 2 * grad.nbytes + pairs * d * 4 + lanes + sorting + placed


@each_dtype
def test_warps_move_whole_sectors(dtype: torch.dtype) -> None:
    """A request of a warp that touches half of a sector of 32 bytes moves it all."""
    targets, sources = ([torch.randn(8192) for _ in range(2)] for _ in range(2))
    sources = [source.to(dtype) for source in sources]
    shadow = [torch.zeros(8192, dtype=torch.bfloat16) for _ in range(2)]
    _watch(_ops().ema_update_, targets, sources, 0.75, 0.25, None, shadow)
    assert _watch.sectors() * 32 == sum(_watch.everything()) == 2 * 8192 * (10 + dtype.itemsize)

    slopes = [torch.randn(8192).to(dtype) for _ in range(2)]
    _watch(_ops().jepa_loss_backward, torch.tensor(0.5), slopes, slopes, 1.0)
    # The factor: a sector for each warp of eight in two thread blocks of two tensors.
    assert (_watch.sectors() - 32) * 32 == 4 * slopes[0].nbytes

    # Rows of 384: beside the tensors a sector per warp and index or factor, of a table of fp32
    # twice where the predictions are narrower.
    inputs = loss_case("l", 2, 2, 7, 9, 384, noised=True).make_inputs(CPU, dtype, 0)
    _loss_call(inputs)
    assert _watch.sectors() * 32 <= 1.1 * (5 * inputs["pred"].nbytes)
    inputs = predictor_case("p", 2, 4, 7, 7, 9, 384, noise=None).make_inputs(CPU, dtype, 0)
    forward, backward = _predictor_calls(inputs, 9)
    out = forward()
    tables = 2 * (2 * 7 + 2 * 2 * 4 * 7) * 384 * 4
    assert _watch.sectors() * 32 <= 1.1 * (out.nbytes + inputs["context"].nbytes + tables)
    backward(out)
    small = (9 + 2 * 8 + 1) * 384 * 4
    assert _watch.sectors() * 32 <= 1.1 * (2 * out.nbytes + inputs["context"].nbytes + small)


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
