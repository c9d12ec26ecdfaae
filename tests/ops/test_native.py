"""The native kernels against the specification, for every instruction set of this processor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from njepa_kernels import NoiseKey, philox_normal
from njepa_kernels._runtime import dispatch, native
from njepa_kernels.ops.add_layer_norm.cases import _case as norm_case
from njepa_kernels.ops.bias_gelu.cases import _case as gelu_case
from njepa_kernels.ops.ema_update_.reference import ema_update_reference_
from njepa_kernels.ops.gather_tokens.cases import _case as gather_case
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.patchify.cases import _case as patchify_case
from njepa_kernels.ops.predictor_tokens.cases import _case as predictor_case
from njepa_kernels.ops.vicreg.cases import _case as vicreg_case
from njepa_kernels.testing import (
    OpCase,
    all_cases,
    assert_case_within_baseline,
    assert_within_baseline,
    cast_inputs,
    evaluate,
)

from tests.support import native_build
from tests.support.native_adapters import NATIVE
from tests.support.noise_checks import check_draws, noise_of

CPU = torch.device("cpu")
LOW = (torch.bfloat16, torch.float16)
SEEDS = range(3)

CASES = [
    *all_cases(small=True),
    # Widths around those of the vectors, tokens and blocks of one.
    *(patchify_case(f"b2-2x3-p{p}-k5", 2, (2, 3), p, 5) for p in (2, 3, 4, 6, 9, 11, 32)),
    *(gather_case(f"b2-n5-k3-d{d}", 2, 5, 3, d) for d in (1, 7, 31, 130)),
    *(predictor_case(f"b2-m2-kc3-kt2-n9-d{d}", 2, 2, 3, 2, 9, d) for d in (1, 5, 66, 2048)),
    predictor_case("b2-m2-kc0-kt3", 2, 2, 0, 3, 9, 20),
    predictor_case("b2-m2-kc3-kt0", 2, 2, 3, 0, 9, 20),
    *(loss_case(f"b2-m2-kt2-n9-d{d}", 2, 2, 2, 9, d) for d in (1, 15, 17, 2048)),
    *(
        loss_case(f"b2-m2-kt2-n9-d{d}-noised", 2, 2, 2, 9, d, noised=True)
        for d in (1, 17, 130, 2048)
    ),
    *(norm_case(f"b1-n40-d{d}", 1, 40, d) for d in (7, 17, 130, 2048)),
    *(norm_case(f"b1-n3-d{d}-own", 1, 3, d, stream="own") for d in (15, 31, 129)),
    *(gelu_case(f"b1-n40-h{h}", 1, 40, h) for h in (7, 17, 130, 2050)),
    gelu_case("b1-n3-h1025-tanh", 1, 3, 1025, approximate="tanh"),
    # More than one tile, panel and block of columns; edges inside each of them.
    vicreg_case("m3-n70-d200", 3, 70, 200),
    vicreg_case("m2-n150-d70", 2, 150, 70),
    vicreg_case("m1-n64-d64", 1, 64, 64),
    vicreg_case("n2-d1", None, 2, 1),
    vicreg_case("n300-d5", None, 300, 5),
    vicreg_case("n12-d700", None, 12, 700),
]
LISTS = ("ema_update_", "adamw_ema_")  # of as many tensors as a network has
LARGE = [
    case
    for case in all_cases(small=False)
    if "cpu" in case.devices and case.size.startswith(("vits16", "m4-n128"))
]

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, *LOW], ids=lambda d: str(d).removeprefix("torch.")
)


@pytest.fixture(scope="module", autouse=True)
def _library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = native._status.copy()
    if native.available() != "yes":
        obstacle = native_build.no_compiler()
        if obstacle is not None:
            pytest.skip(obstacle)
        built = native_build.build_library(tmp_path_factory.mktemp("so"))
        native._status["cpu"] = native.load(built)
    assert native.available() == "yes"
    yield
    native._status = before


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in native.ops().instruction_sets().split():
        pytest.skip(f"this processor has no {request.param}")
    before = native.ops().use_instruction_set(request.param)
    yield request.param
    native.ops().use_instruction_set(before)


def _agree(case: OpCase, dtype: torch.dtype, seeds: range) -> None:
    got, base = assert_case_within_baseline(case, NATIVE[case.op], CPU, dtype, seeds)
    for name, value in got.items():
        assert value.dtype == base[name].dtype


@pytest.mark.usefixtures("instruction_set")
@each_dtype
def test_values_and_gradients_are_within_the_baseline(dtype: torch.dtype) -> None:
    # One test for all cases of a type: a thousand tests would cost more than they check.
    assert {case.op for case in CASES} == set(NATIVE)
    for case in CASES:
        _agree(case, dtype, SEEDS)


@pytest.mark.parametrize(
    "case", [c for c in LARGE if c.op not in LISTS], ids=lambda case: case.name
)
def test_real_sizes_are_within_the_baseline(case: OpCase) -> None:
    _agree(case, torch.float32, range(1))


@pytest.mark.parametrize(
    "case",
    [*LARGE, vicreg_case("m2-n200-d130", 2, 200, 130)],
    ids=lambda case: case.name,
)
def test_every_number_of_threads_gives_the_same_bits(case: OpCase) -> None:
    before = torch.get_num_threads()
    inputs = case.make_inputs(CPU, torch.float32, 0)
    if case.op in LISTS:
        inputs = {name: v[:12] if isinstance(v, list) else v for name, v in inputs.items()}
    values = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            values.append(evaluate(case, NATIVE[case.op], inputs))
    finally:
        torch.set_num_threads(before)
    for other in values[1:]:
        for name, value in values[0].items():
            assert torch.equal(value, other[name]), name


# Noise


@pytest.mark.usefixtures("instruction_set")
def test_noise_equals_the_reference() -> None:
    """10^6 draws: the same words, normals within 1e-6."""
    worst = 0.0
    ids = torch.tensor([5, 2**32 - 1, 2**40 + 3])
    patches = torch.randint(0, 2**32, (3, 2, 3))
    for seed, step in ((7, 0), (2**32 - 1, 2**31), (-4, 2**35 + 1)):
        expected = philox_normal(NoiseKey(seed, step, ids), patches, 18_517)
        for b, m, t in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(3)):
            counter = torch.stack((ids[b] % 2**32, m, patches[b, m, t]))
            got = native.ops().token_normals(counter, seed % 2**32, step % 2**32, 18_517)
            worst = max(worst, float((got - expected[b, m, t]).abs().max()))
    assert worst <= 1e-6


@pytest.mark.usefixtures("instruction_set")
def test_draws_per_block_and_shared() -> None:
    check_draws(noise_of(NATIVE["predictor_tokens"]))


def _predictor_inputs(batch: int = 3, d: int = 50) -> dict[str, Any]:
    case = predictor_case("permuted", batch, 2, 5, 4, 16, d)
    return case.make_inputs(CPU, torch.float32, 1)


@pytest.mark.usefixtures("instruction_set")
def test_noise_does_not_depend_on_the_layout_of_the_batch() -> None:
    inputs = _predictor_inputs()
    run = NATIVE["predictor_tokens"]
    whole = run(**inputs).view(2, 3, 9, 50)
    noise = inputs["noise"]
    for rows in (torch.tensor([2, 0, 1]), *torch.arange(3).split(1)):
        some = {k: inputs[k][rows] for k in ("context", "context_idx", "target_idx", "sigma")}
        some["noise"] = noise._replace(sample_ids=noise.sample_ids[rows])
        part = run(**(inputs | some)).view(2, len(rows), 9, 50)
        assert torch.equal(part, whole[:, rows])


@each_dtype
def test_sigma_zero_is_no_noise_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = _predictor_inputs()
    inputs["context"] = inputs["context"].to(dtype)
    run = NATIVE["predictor_tokens"]
    zero = run(**(inputs | {"sigma": torch.zeros(3, 2)}))
    assert torch.equal(zero, run(**(inputs | {"sigma": None})))


# Rounding and duplicates


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", LOW)
def test_every_16_bit_pattern_is_widened_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(dtype).view(1, 64, 1024)
    idx = torch.arange(64).view(1, 64)
    # A tiny number and fractions of the distance to the next value: ties, up and down, overflow.
    spacing = (x[0].float() * torch.finfo(dtype).eps).nan_to_num(0.0, 0.0, 0.0)
    for shift in (0.0, 0.25, 0.5, 0.50001, -0.5, 1.5):
        pos = spacing * shift + (1e-9 if shift else 0.0)
        got = NATIVE["gather_tokens"](x, idx, pos)
        expected = (x.float() + pos).to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.usefixtures("instruction_set")
def test_shadow_is_the_rounded_target() -> None:
    target = torch.cat((torch.randn(1000) * 1e3, torch.tensor([float("inf"), float("nan"), 0.0])))
    shadow = torch.zeros_like(target, dtype=torch.bfloat16)
    NATIVE["ema_update_"]([target], [target.clone()], torch.tensor(0.25), [shadow])
    assert torch.equal(shadow.nan_to_num(7.0), target.bfloat16().nan_to_num(7.0))


@each_dtype
def test_ema_has_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    if native.ops().instruction_sets() == "baseline" or "AVX" not in (
        torch.backends.cpu.get_cpu_capability()
    ):
        pytest.skip("torch rounds twice where there is no fused multiply-add")
    targets = [torch.randn(size) for size in (1, 100, 5000, 70_001)]
    sources = [torch.randn_like(target).to(dtype) for target in targets]
    expected = [target.clone() for target in targets]
    for momentum in (0.996, torch.tensor(0.9, dtype=torch.float64)):
        ema_update_reference_(expected, [source.float() for source in sources], float(momentum))
        NATIVE["ema_update_"](targets, sources, momentum)
    assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))


@each_dtype
def test_all_tokens_from_one_patch(dtype: torch.dtype) -> None:
    for op in ("gather_tokens", "predictor_tokens"):
        (case,) = [
            c
            for c in all_cases(op, small=True)
            if c.size in ("b2-n49-m4-k9-d64", "b3-m4-kc10-kt6-n36-d48-noise")
        ]
        inputs = case.make_inputs(CPU, dtype, 0)
        for name in ("idx", "context_idx", "target_idx"):
            if name in inputs:
                inputs[name] = torch.full_like(inputs[name], 3)
        exact = evaluate(case, case.reference, cast_inputs(inputs, torch.float64))
        eager = evaluate(case, case.eager, inputs)
        for name, value in evaluate(case, NATIVE[op], inputs).items():
            assert_within_baseline(value, eager[name], exact[name], value.dtype, f"{op} {name}")


# Refusals


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("gather_tokens", {"idx": torch.full((3, 12), 49)}, "idx must be int64 in [0, 49), got 49"),
        ("gather_tokens", {"idx": torch.full((3, 12), -1)}, "idx must be int64 in [0, 49), got -1"),
        ("gather_tokens", {"idx": torch.zeros(3, 12).int()}, "idx must be int64"),
        ("patchify", {"idx": torch.full((2, 7), 36)}, "idx must be int64 in [0, 36), got 36"),
        ("patchify", {"images": torch.zeros(2, 48, 48, 3)}, "images must be a uint8 CPU tensor"),
        ("patchify", {"patch_size": 5}, "H and W must be multiples of 5, got 48 x 48"),
        ("patchify", {"out_dtype": torch.float64}, "out must be float32, bfloat16 or float16"),
        ("gather_tokens", {"x": torch.zeros(3, 49, 64).double()}, "x must be float32, bfloat16"),
        ("gather_tokens", {"x": torch.zeros(3, 64, 49).mT}, "x must be a contiguous CPU tensor"),
        ("gather_tokens", {"pos": torch.zeros(48, 64)}, "pos has a wrong shape"),
        ("jepa_loss", {"target_idx": torch.full((3, 4, 6), 36)}, "in [0, 36), got 36"),
        ("predictor_tokens", {"context_idx": torch.full((3, 10), 36)}, "in [0, 36), got 36"),
        ("predictor_tokens", {"target_idx": torch.full((3, 4, 6), -5)}, "in [0, 36), got -5"),
        ("predictor_tokens", {"sigma": torch.zeros(3, 4, 6)}, "sigma has a wrong shape"),
        ("predictor_tokens", {"sigma": torch.zeros(3, 4), "noise": None}, "sample_ids must be giv"),
        ("vicreg", {"u": torch.zeros(4, 1, 8)}, "u must have views, 2 samples and channels"),
        ("ema_update_", {"targets": []}, "must be of one length"),
        ("add_layer_norm", {"residual": torch.zeros(2, 9, 63)}, "residual has a wrong shape"),
        ("add_layer_norm", {"bias": torch.zeros(63)}, "bias has a wrong shape"),
        ("bias_gelu", {"x": torch.zeros(2, 9, 128).double()}, "x must be float32, bfloat16"),
        ("bias_gelu", {"bias": torch.zeros(127)}, "bias has a wrong shape"),
    ],
)
def test_bad_arguments_raise_instead_of_reading_foreign_memory(
    op: str, change: dict[str, Any], message: str
) -> None:
    case = all_cases(op, small=True)[0]
    inputs = case.make_inputs(CPU, torch.float32, 0) | change
    if op == "ema_update_":
        inputs["sources"] = inputs["sources"][:1]
        inputs["targets"] = [torch.zeros(3)] * 2
    with pytest.raises(RuntimeError, match=re.escape(message)):
        NATIVE[op](**inputs)


def test_reasons_say_what_is_wrong_and_how_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = native.load(tmp_path / "absent.so")
    assert "is not built" in missing
    assert "pip install --no-build-isolation" in missing
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    assert "does not load" in native.load(broken)
    assert "for CUDA has no vicreg, only predictor" in native.available("vicreg", "cuda")
    assert native.available("vicreg", "mps") == "the native library has no kernels for mps"
    monkeypatch.setitem(native._status, "cpu", missing)
    with pytest.raises(RuntimeError, match="is not built"):
        native.ops()


def test_a_library_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "__version__", "9.9.9")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    present = tmp_path / "present.so"
    present.touch()
    assert "is of version 0.1.0, not 9.9.9" in native.load(present)


def test_a_library_older_than_an_op_is_said_and_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the same version, built before the op was written."""
    path, namespace = native.LIBRARIES["cpu"]

    class Older:
        """Everything that the library has, but one op."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("bias_gelu"):
                raise AttributeError(name)
            return getattr(getattr(torch.ops, namespace), name)

    monkeypatch.setattr(torch.ops, "older", Older(), raising=False)
    monkeypatch.setitem(native.LIBRARIES, "cpu", (path, "older"))
    monkeypatch.setattr(dispatch, "_found", {})
    reason = "the native library is older than bias_gelu; to build: NJEPA_BUILD_NATIVE=1 pip"
    assert native.available() == native.available("vicreg") == "yes"
    assert reason in dispatch.available_impls()["bias_gelu"]["native"]
    assert dispatch.choose("bias_gelu", "auto", CPU) == "reference"
    assert dispatch.choose("vicreg", "auto", CPU) == "native"
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        dispatch.choose("bias_gelu", "native", CPU)
