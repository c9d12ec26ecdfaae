"""The library with the CUDA kernels, as nvcc makes it: no spills, no runtime to find, no GPU.

Built here only where nvcc is and setup.py has not built it yet.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from njepa_kernels._runtime import native
from njepa_kernels.tools.resources import ARCHITECTURES, main, measure_native, table

from tests.support import native_build


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = native.LIBRARIES["cuda"][0]
    if built.exists():
        return built
    obstacle = native_build.no_nvcc()
    if obstacle is not None:
        pytest.skip(obstacle)
    return native_build.build_cuda_library(tmp_path_factory.mktemp("cuda"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton's cuobjdump")
def test_no_kernel_spills_on_any_architecture(library: Path) -> None:
    rows = measure_native(library)
    assert {row.arch for row in rows} == set(ARCHITECTURES)
    for arch in ARCHITECTURES:
        kernels = {row.kernel for row in rows if row.arch == arch}
        for op in native.CUDA_OPS:
            own = {kernel for kernel in kernels if kernel.startswith(op.rstrip("_"))}
            assert own, op
            kernels -= own
        assert not kernels
    spilling = [row for row in rows if row.local]
    assert not spilling, table(spilling)
    assert all(0 < row.registers <= 128 and row.shared <= 48 * 1024 for row in rows), table(rows)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton's cuobjdump")
def test_the_table_has_the_kernels_of_the_library(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(native.LIBRARIES, "cuda", (library, "njepa_native_cuda"))
    assert main(["--op", "ema_update_", "--arch", "90", "--size", "vits16"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " native " in line]
    assert [line.split()[0] for line in lines] == ["ema_update"] * 3


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_library_asks_for_torch_but_for_no_cuda_runtime(library: Path) -> None:
    done = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True, timeout=60
    )
    needed = [line for line in done.stdout.splitlines() if "NEEDED" in line]
    assert any("libtorch_cuda.so" in line for line in needed)
    for name in ("libcudart", "libpython", "libc10"):
        assert not any(name in line for line in needed), needed


def test_the_library_loads_without_a_gpu(library: Path) -> None:
    code = (
        "from pathlib import Path; from njepa_kernels._runtime import native; import torch; "
        f"print(native.load(Path({str(library)!r}), 'cuda')); "
        "ops = torch.ops.njepa_native_cuda; t = torch.zeros(3)\n"
        "try: ops.ema_update_([t], [t], 0.5, 0.5, None, [])\n"
        "except NotImplementedError: print('only for CUDA')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(native.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "yes\nonly for CUDA\n"), done.stderr


@pytest.mark.parametrize("op", ["gather_tokens", "vicreg"])
def test_ops_without_a_cuda_kernel_say_so(op: str) -> None:
    assert f"for CUDA has no {op}, only predictor_tokens" in native.available(op, "cuda")
