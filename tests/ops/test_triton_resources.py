"""Every Triton kernel, compiled for each architecture at the sizes that are trained; no GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re

import pytest
import torch
from njepa_kernels import NoiseKey, available_impls
from njepa_kernels._runtime.launch import Launch, record_launches
from njepa_kernels.testing import all_cases
from njepa_kernels.tools.resources import (
    ARCHITECTURES,
    SHARED_LIMIT,
    _usage,
    cases,
    compile_launch,
    launches,
    main,
    measure,
    table,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]


def _launches(op: str, size: str) -> list[Launch]:
    return [launch for case in cases(op, size) for launch in launches(case, torch.bfloat16, 90)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", list(available_impls()))
def test_no_spills_and_shared_memory_within_the_limit(op: str, arch: int) -> None:
    rows = list(measure(op, "", torch.bfloat16, arch))
    assert {row.size for row in rows} <= {case.size for case in all_cases(op, small=False)}
    for row in rows:
        assert row.local == 0, row
        assert row.shared <= SHARED_LIMIT[arch], row
        assert 0 < row.registers <= 255, row
        # A multiprocessor has 65,536 registers: at least two programs find room.
        assert 2 * row.registers * row.warps * 32 <= 65536, row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", list(available_impls()))
def test_other_types_compile_without_spills(op: str, dtype: torch.dtype) -> None:
    rows = [row for arch in ARCHITECTURES for row in measure(op, "vitl16", dtype, arch)]
    assert {row.arch for row in rows} == set(ARCHITECTURES)
    assert all(row.local == 0 for row in rows), table(rows)


@pytest.mark.parametrize("op", list(available_impls()))
def test_large_reads_and_writes_are_16_bytes_wide(op: str) -> None:
    for launch in _launches(op, "vitl16"):
        name = launch.kernel.__name__
        # Three numbers per program of the kernel before it; indices only; what its arguments say;
        # the few partial sums of the kernel before it.
        few = ("_jepa_loss_terms_kernel", "_invert_index_kernel", "_write_row_kernel")
        few += ("_column_sums_kernel",)
        if name in few:
            continue
        ptx = compile_launch(launch, 90).asm["ptx"]
        # Bytes of one channel lie a pixel apart: the cache, not the width, makes those reads cheap.
        if name != "_patchify_kernel":
            assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global", ptx), name
        sums = ("_vicreg_stats", "_vicreg_spread", "_vicreg_product")  # few beside what was read
        if not name.startswith((*sums, "_predictor_tokens_bwd_target", "_sum_by_index")):
            assert re.search(r"st\.global\S*\.v4\.b32", ptx), name


def test_every_kernel_of_every_op_is_launched() -> None:
    found = {launch.kernel.__name__ for op in available_impls() for launch in _launches(op, "")}
    for op in available_impls():
        assert _kernels(f"ops.{op}.triton_kernel") <= found
    for module in ("by_index", "column_sums", "address_rows"):
        assert _kernels(f"_runtime.{module}") <= found


def _kernels(module: str) -> set[str]:
    names = vars(importlib.import_module(f"njepa_kernels.{module}"))
    found = {name for name in names if name.endswith("_kernel")}
    assert found
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_wider_than_the_registers_compile_without_spills(arch: int) -> None:
    from njepa_kernels.ops.add_layer_norm import triton_kernel as norm
    from njepa_kernels.ops.jepa_loss import triton_kernel as loss
    from njepa_kernels.ops.predictor_tokens import triton_kernel as predictor

    width = 4096
    grad = torch.empty(8, 50, width, dtype=torch.bfloat16, device="meta")
    idx = torch.empty(2, 4, 50, dtype=torch.int64, device="meta")
    with record_launches(arch) as recorded:
        loss.forward(grad, grad[:2], idx, grad, 0.1, 0.1, 1.0, 1e-5, 1e-6, 1e-6, 1e-6, True, True)
        predictor.backward(
            grad, idx[:, 0, :10], idx[..., :40], NoiseKey(7, 1, idx[:, 0, 0]), 50, False, True
        )
        for wide in (4096, 8192):
            x = torch.empty(100, wide, dtype=torch.bfloat16, device="meta")
            weight, stats = x[0].float(), x.new_empty(2, 100, dtype=torch.float32)
            norm.forward(x, x.float(), weight, weight, 1e-6, torch.bfloat16)
            norm.backward(x, x.float(), x.float(), stats, weight, torch.bfloat16)
    for launch in recorded:
        usage = _usage(compile_launch(launch, arch))
        assert usage["STACK"] + usage["LOCAL"] == 0, (launch.kernel.__name__, usage)


def test_a_row_that_fits_is_read_once() -> None:
    """One 16-byte load per thread for each of h, pred and noised; three of h otherwise."""
    forward = [
        launch
        for launch in _launches("jepa_loss", "vitl16-224-b128")
        if launch.kernel.__name__ == "_jepa_loss_fwd_kernel"
    ]
    counts = [compile_launch(launch, 90).asm["ptx"].count("ld.global.v4.b32") for launch in forward]
    assert counts == [2, 3]


def test_the_target_pass_sums_over_rows_after_its_loop() -> None:
    (launch, *_) = (
        launch
        for launch in _launches("predictor_tokens", "vits16-224-b128")
        if launch.kernel.__name__ == "_predictor_tokens_bwd_target_kernel"
    )
    assert not launch.meta["NEED_SIGMA"]
    text = compile_launch(launch, 90).asm["ttgir"]
    assert text.count('"tt.reduce"') == 1
    assert text.index("scf.yield") < text.index('"tt.reduce"')


def test_command_prints_one_line_per_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--op", "jepa_loss", "--arch", "90", "--size", "vits16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kernel", "size", "dtype", "sm", "reg", "shared", "local"]
    assert lines[-1] == f"{len(lines) - 2} kernels, 0 with spills or too much shared memory"
    assert lines[1].startswith("jepa_loss_fwd")
