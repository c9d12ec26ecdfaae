"""The package alone: what it imports, what it says about itself, and the tolerance helper."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import njepa_kernels
import pytest
import torch
from njepa_kernels._runtime import dispatch
from njepa_kernels._runtime.dispatch import choose, interpreting
from njepa_kernels.testing import assert_within_baseline

BLOCKED = [
    "numpy",
    "timm",
    "deepspeed",
    "yaml",
    "nvidia",
    "triton",
    "pydantic",
    "torchvision",
    "PIL",
    "safetensors",
    "njepa",
]


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_op_runs_where_torch_is_all_there_is() -> None:
    out = _run(f"""
        import sys
        for name in {BLOCKED!r}:
            sys.modules[name] = None
        import torch
        import njepa_kernels
        from njepa_kernels.testing import all_cases, evaluate
        ops = set()
        for case in all_cases(small=True):
            evaluate(case, case.function, case.make_inputs(torch.device("cpu"), torch.float32, 0))
            ops.add(case.op)
        assert ops == set(njepa_kernels.available_impls()), ops
        print(len(ops))
    """)
    assert out.strip() == "9"


def test_import_brings_nothing_but_the_package_and_the_standard_library() -> None:
    out = _run("""
        import sys
        import torch
        before = set(sys.modules)
        import njepa_kernels
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - set(sys.stdlib_module_names)))
    """)
    assert out.strip() == "['njepa_kernels']"


def test_import_changes_no_state() -> None:
    out = _run("""
        import warnings
        warnings.simplefilter("error")
        import torch
        before = (torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled())
        import njepa_kernels
        after = (torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled())
        print(torch.equal(before[0], after[0]), before[1:] == after[1:])
    """)
    assert out.split() == ["True", "True"]


def test_available_impls_gives_yes_or_a_reason() -> None:
    table = njepa_kernels.available_impls()
    assert list(table) == [
        "patchify",
        "gather_tokens",
        "predictor_tokens",
        "jepa_loss",
        "vicreg",
        "ema_update_",
        "add_layer_norm",
        "bias_gelu",
        "adamw_ema_",
    ]
    for op, impls in table.items():
        assert set(impls) == {"reference", "triton", "native"}
        assert callable(getattr(njepa_kernels, op))
        for impl, status in impls.items():
            if status == "yes" and (impl != "triton" or interpreting()):
                assert choose(op, impl, torch.device("cpu")) == impl
            elif status != "yes":
                with pytest.raises(RuntimeError, match=re.escape(status)):
                    choose(op, impl, torch.device("cpu"))
        assert impls[choose(op, "auto", torch.device("cpu"))] == "yes"


def test_auto_takes_the_first_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    runs = {"native", "triton", "reference"}
    monkeypatch.setattr(
        dispatch, "_status", lambda op, impl, device, wide: "yes" if impl in runs else "no"
    )
    assert choose("vicreg", "auto", cpu) == "native"
    assert choose("vicreg", "auto", cuda) == "triton"
    assert choose("vicreg", "auto", torch.device("meta")) == "reference"
    runs -= {"triton"}
    assert choose("vicreg", "auto", cuda) == "native"
    runs -= {"native"}
    assert choose("vicreg", "auto", cuda) == choose("vicreg", "auto", cpu) == "reference"


def test_float64_is_for_the_reference() -> None:
    wide = torch.zeros(2, dtype=torch.float64)
    assert choose("vicreg", "auto", wide.device, None, wide) == "reference"
    for impl in ("native", "triton"):
        with pytest.raises(RuntimeError, match="float64 inputs are computed by the reference only"):
            choose("vicreg", impl, wide.device, None, wide)


def test_public_names() -> None:
    assert njepa_kernels.__version__.count(".") == 2
    for name in njepa_kernels.__all__:
        assert hasattr(njepa_kernels, name)


# The tolerance helper must fail when it should

EXACT = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def test_tolerance_accepts_twice_the_baseline() -> None:
    eager = EXACT + 1e-3
    assert_within_baseline(EXACT + 1.9e-3, eager, EXACT, torch.float32, "op")
    with pytest.raises(AssertionError, match=r"max abs error 2\.1"):
        assert_within_baseline(EXACT + 2.1e-3, eager, EXACT, torch.float32, "op")


def test_tolerance_without_baseline_error_is_one_rounding() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        assert_within_baseline(EXACT + 0.9 * eps, EXACT, EXACT, dtype, "op")
        with pytest.raises(AssertionError):
            assert_within_baseline(EXACT + 1.1 * eps, EXACT, EXACT, dtype, "op")


def test_tolerance_follows_the_scale_of_the_values() -> None:
    small = EXACT * 1e-6
    with pytest.raises(AssertionError):
        assert_within_baseline(small + 1e-9, small, small, torch.float32, "a small gradient")


def test_tolerance_names_the_worst_element() -> None:
    wrong = EXACT.clone()
    wrong[1, 2] += 0.5
    with pytest.raises(AssertionError, match=r"op x: .*eager 0.000e\+00.*RMS.*worst at \(1, 2\)"):
        assert_within_baseline(wrong, EXACT, EXACT, torch.float32, "op x")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tolerance_refuses_values_that_are_not_finite(bad: float) -> None:
    wrong = EXACT.clone()
    wrong[0, 0] = bad
    with pytest.raises(AssertionError, match="non-finite"):
        assert_within_baseline(wrong, EXACT, EXACT, torch.float32, "op")
    with pytest.raises(AssertionError, match="non-finite"):
        assert_within_baseline(EXACT, EXACT, wrong, torch.float32, "op")
    assert_within_baseline(wrong, EXACT, wrong, torch.float32, "op")


def test_tolerance_refuses_other_shapes() -> None:
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_within_baseline(EXACT[:2], EXACT, EXACT, torch.float32, "op")
