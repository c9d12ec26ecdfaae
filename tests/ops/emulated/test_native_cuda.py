"""The CUDA kernels, emulated: values, gradients and bits of all ops, and what they refuse."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from njepa_kernels._runtime import native
from njepa_kernels.ops.jepa_loss import native as loss_native
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.predictor_tokens import native as predictor_native
from njepa_kernels.ops.predictor_tokens.cases import _case as predictor_case
from njepa_kernels.testing import OpCase, all_cases, assert_case_within_baseline, evaluate

from tests.support import native_build
from tests.support.emulated_cuda import (
    CASES,
    CHUNKS,
    CPU,
    MARKS,
    SEEDS,
    each_dtype,
    misaligned,
    ops,
)
from tests.support.native_adapters import NATIVE

pytestmark = MARKS


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
            ops().jepa_loss_backward(scalar, [torch.ones(8)], [torch.ones(8)], 1.0)
        _same(runs[0], runs[1], case.name)
        _same(runs[0], runs[2], case.name)


@each_dtype
def test_addresses_that_are_not_aligned_give_the_same_bits(dtype: torch.dtype) -> None:
    cases = [
        predictor_case("d48", 2, 2, 3, 2, 9, 48),
        loss_case("d48", 2, 2, 3, 9, 48, noised=True),
    ]
    for case in cases:
        inputs = case.make_inputs(CPU, dtype, 4)
        shifted = {name: misaligned(value) for name, value in inputs.items()}
        # The functions straight, since the tests' own helper would copy to aligned memory.
        ours, theirs = (NATIVE[case.op](**given) for given in (inputs, shifted))
        if case.op == "predictor_tokens":
            assert torch.equal(ours, theirs)
            rest = (inputs["context_idx"], inputs["target_idx"], inputs["noise"], 9)
            for a, b in zip(
                predictor_native.backward(ours, *rest, True, True),
                predictor_native.backward(misaligned(ours), *rest, True, True),
                strict=True,
            ):
                assert torch.equal(a, b)
        else:
            assert torch.equal(ours.loss, theirs.loss)
            slopes = [inputs["pred"], inputs["pred"] + 1]
            moved = [misaligned(slope) for slope in slopes]
            out = [torch.empty_like(slope) for slope in slopes]
            loss_native.backward(torch.tensor(0.5), slopes, out, 0.25)
            loss_native.backward(torch.tensor(0.5), moved, moved, 0.25)
            for slope, given, in_place in zip(slopes, out, moved, strict=True):
                assert torch.equal(given, (slope.float() * 0.125).to(dtype))
                assert torch.equal(in_place, given)


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
        run = partial(ops().ema_update_, *lists, 0.5, 0.5, None, [])
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run()
