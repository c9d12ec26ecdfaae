"""Memory instructions of the compiled kernels against the bytes of the formulas; no GPU.

Tolerance: none for patchify and jepa_loss at L/16, whose rows fill their programs; 2 % for the
lists of parameters, whose small tensors do not.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from njepa_kernels._runtime.launch import Launch
from njepa_kernels.tools.resources import cases, launches
from njepa_kernels.tools.traffic import Accesses, launch_bytes, main, pieces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
BF16 = 2


def launched(op: str, size: str, kernel: str) -> tuple[Launch, dict]:
    (case,) = [case for case in cases(op, size) if case.size == size]
    found = [x for x in launches(case, torch.bfloat16, 90) if x.kernel.__name__ == kernel]
    return found[0], case.make_inputs(torch.device("meta"), torch.bfloat16, 0)


def test_patchify_loads_each_byte_once_and_stores_each_number_once() -> None:
    launch, given = launched("patchify", "vitl16-224-b128", "_patchify_kernel")
    numbers = given["images"].numel()
    assert launch_bytes(launch, 90) == Accesses(numbers, BF16 * numbers)


def test_the_loss_reads_prediction_and_target_once_and_writes_the_slope_once() -> None:
    launch, given = launched("jepa_loss", "vitl16-224-b128", "_jepa_loss_fwd_kernel")
    numbers = given["pred"].numel()
    assert launch_bytes(launch, 90) == Accesses(2 * BF16 * numbers, BF16 * numbers)


def test_the_average_moves_the_bytes_of_its_formula() -> None:
    launch, given = launched("ema_update_", "vits16", "_ema_update_kernel")
    numbers = sum(t.numel() for t in given["targets"])
    loaded, stored = launch_bytes(launch, 90)
    for got in (loaded, stored):  # fp32 target and bf16 source, fp32 target and bf16 copy
        assert (4 + BF16) * numbers <= got <= 1.02 * (4 + BF16) * numbers


def test_adamw_with_the_average_reads_and_writes_each_tensor_once() -> None:
    launch, given = launched("adamw_ema_", "vits16", "_adamw_ema_kernel")
    numbers = sum(t.numel() for t in given["params"])
    loaded, stored = launch_bytes(launch, 90)
    # fp32 weight, two moments and target; a bf16 gradient is read, two bf16 copies are written.
    assert (16 + BF16) * numbers <= loaded <= 1.01 * (16 + BF16) * numbers
    assert (16 + 2 * BF16) * numbers <= stored <= 1.01 * (16 + 2 * BF16) * numbers


def test_pieces_end_at_labels_and_branches() -> None:
    ptx = """
      @%p1 ld.global.b64 { %rd5 }, [ %rd6 + 0 ];
      ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
      @%p3 bra $L__BB0_2;
      st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
      st.global.v2.b64 [ %rd1 + 0 ], { %rd1, %rd2 };
    $L__BB0_2:
      ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
      @%p2 ld.global.b8 { %rs1 }, [ %rd1 + 0 ];
    """
    assert pieces(ptx) == [Accesses(16, 0), Accesses(0, 32), Accesses(1, 0)]


def test_the_table_names_both_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--size", "vits16-224-b8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "jepa_loss_fwd" for line in lines)
    patchify = next(line for line in lines if line.startswith("patchify")).split()
    assert float(patchify[2]) + float(patchify[3]) == pytest.approx(float(patchify[4]), rel=0.01)
