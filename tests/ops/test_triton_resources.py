"""Every Triton kernel, compiled for each architecture at the sizes that are trained; no GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re

import pytest
import torch
from njepa_kernels import available_impls
from njepa_kernels.resources import (
    ARCHITECTURES,
    SHARED_LIMIT,
    SIZES,
    compile_launch,
    launches,
    main,
    measure,
    table,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", list(available_impls()))
def test_no_spills_and_shared_memory_within_the_limit(op: str, arch: int) -> None:
    rows = [row for size in SIZES for row in measure(op, size, torch.bfloat16, arch)]
    assert {row.size for row in rows} == set(SIZES)
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
    for launch in launches(op, "vitl16", torch.bfloat16, 90):
        name = launch.kernel.__name__
        # Three numbers per program of the kernel before it; what its arguments say.
        if name in ("_jepa_loss_terms_kernel", "_write_row_kernel"):
            continue
        ptx = compile_launch(launch, 90).asm["ptx"]
        # Bytes of one channel lie a pixel apart: the cache, not the width, makes those reads cheap.
        if name != "_patchify_kernel":
            assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global", ptx), name
        if not name.startswith(("_vicreg_stats", "_vicreg_spread", "_vicreg_product")):
            assert re.search(r"st\.global\S*\.v4\.b32", ptx), name


def test_every_kernel_of_every_op_is_launched() -> None:
    found = {
        launch.kernel.__name__
        for op in available_impls()
        for launch in launches(op, "vits16", torch.bfloat16, 90)
    }
    for op in available_impls():
        module = importlib.import_module(f"njepa_kernels.{op}.triton_kernel")
        kernels = {name for name in vars(module) if name.endswith("_kernel")}
        assert kernels
        assert kernels <= found


def test_command_prints_one_line_per_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--op", "jepa_loss", "--arch", "90", "--size", "vits16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kernel", "size", "dtype", "sm", "reg", "shared", "local"]
    assert lines[-1] == f"{len(lines) - 2} kernels, 0 with spills or too much shared memory"
    assert lines[1].startswith("jepa_loss_fwd")
