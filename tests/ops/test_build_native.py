"""The optional native library: built with a compiler, refused or left out without one."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import native_build
from tests.support.native_build import LIBRARY, run_setup

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(
    native_build.no_compiler() is not None, reason="there is no C++ compiler"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_build.copy_of_the_project(tmp_path_factory.mktemp("build") / "project")


@needs_compiler
def test_a_wheel_for_any_python_that_loads_and_needs_only_torch(
    project: Path, tmp_path: Path
) -> None:
    done = run_setup(project, "bdist_wheel", "--dist-dir", str(tmp_path), choice="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    library = tmp_path / "site" / LIBRARY
    content = library.read_bytes()
    for name, wanted in ((b"libtorch_cpu.so", True), (b"libc10.so", False), (b"libpython", False)):
        assert (name in content) == wanted, name
    code = """
        import njepa_kernels, torch
        from njepa_kernels._runtime import native
        print(njepa_kernels.__file__)
        print(native.available(), torch.ops.njepa_native.version() == njepa_kernels.__version__)
    """
    out = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())],
        cwd=tmp_path / "site",
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert str(tmp_path) in out.stdout
    assert out.stdout.split()[1:] == ["yes", "True"]


def _build(
    project: Path, out: Path, choice: str | None, **environment: str
) -> tuple[int, str, bool]:
    done = run_setup(project, "build_ext", "--build-lib", str(out), choice=choice, **environment)
    return done.returncode, done.stdout + done.stderr, (out / LIBRARY).exists()


def test_zero_builds_nothing_and_says_nothing(project: Path, tmp_path: Path) -> None:
    code, output, built = _build(project, tmp_path, "0")
    assert (code, built) == (0, False)
    assert "NJEPA_BUILD_NATIVE" not in output


@pytest.mark.parametrize("choice", [None, "auto"])
def test_without_a_compiler_auto_says_in_one_line_how_to(
    project: Path, tmp_path: Path, choice: str | None
) -> None:
    code, output, built = _build(project, tmp_path, choice, PATH=str(tmp_path), CXX="")
    assert (code, built) == (0, False)
    (line,) = [line for line in output.splitlines() if "without the native library" in line]
    assert "no C++ compiler" in line
    assert "NJEPA_BUILD_NATIVE=1 pip install --no-build-isolation ." in line


def test_without_a_compiler_one_fails_loudly(project: Path, tmp_path: Path) -> None:
    code, output, built = _build(project, tmp_path, "1", PATH=str(tmp_path), CXX="")
    assert code != 0
    assert not built
    assert "NJEPA_BUILD_NATIVE=1, but no C++ compiler was found" in output


def test_without_torch_auto_builds_nothing(project: Path, tmp_path: Path) -> None:
    # -S hides site-packages, and with them torch; setuptools comes in by the path.
    import setuptools

    shown = tmp_path / "only_setuptools"
    shown.mkdir()
    packages = Path(setuptools.__file__).parents[1]
    for name in ("setuptools", "_distutils_hack"):
        if (packages / name).exists():
            (shown / name).symlink_to(packages / name)
    done = subprocess.run(
        [sys.executable, "-S", "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=project,
        env={"PYTHONPATH": str(shown), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "because torch is not installed where the build runs" in done.stdout
    assert not (tmp_path / "lib" / LIBRARY).exists()


@pytest.mark.parametrize(("choice", "passes"), [("auto", True), ("1", False)])
def test_a_compiler_that_fails(project: Path, tmp_path: Path, choice: str, passes: bool) -> None:
    code, output, built = _build(project, tmp_path, choice, CXX="false")
    assert (code == 0) == passes
    assert not built
    assert "failed with 1" in output


def test_another_value_is_refused(project: Path, tmp_path: Path) -> None:
    code, output, _ = _build(project, tmp_path, "yes")
    assert code != 0
    assert "NJEPA_BUILD_NATIVE must be auto, 0 or 1, got 'yes'" in output


# The library for CUDA; that it builds where nvcc is: test_native_cuda_library.py

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V0" ;;
*) echo "no license today" >&2; exit 3 ;;
esac
"""


def _cuda_home(folder: Path, release: str | None) -> str:
    """A CUDA_HOME whose nvcc says it is of a release, and fails; or without one."""
    tool = folder / "cuda" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    if release is not None:
        tool.write_text(NVCC.format(release=release))
        tool.chmod(0o755)
    return str(folder / "cuda")


@needs_compiler
def test_without_nvcc_the_library_for_cpu_and_one_line(project: Path, tmp_path: Path) -> None:
    home = _cuda_home(tmp_path, None)
    environment = {"CUDA_HOME": home, "NJEPA_BUILD_CUDA": "auto"}
    code, output, built = _build(project, tmp_path, "1", **environment)
    assert (code, built) == (0, True)
    (line,) = [line for line in output.splitlines() if "without the native library" in line]
    assert line.endswith(f"for CUDA, because no nvcc was found in $CUDA_HOME={home}")
    assert not (tmp_path / native_build.CUDA_LIBRARY).exists()


@needs_compiler
@pytest.mark.parametrize(
    ("release", "message"),
    [(None, "but no nvcc was found in $CUDA_HOME="), ("12.4", "but nvcc>=12.8 is needed")],
)
def test_cuda_asked_for_and_no_fitting_nvcc(
    project: Path, tmp_path: Path, release: str | None, message: str
) -> None:
    environment = {"CUDA_HOME": _cuda_home(tmp_path, release), "NJEPA_BUILD_CUDA": "1"}
    code, output, built = _build(project, tmp_path, "auto", **environment)
    assert code != 0
    assert not built
    assert f"NJEPA_BUILD_CUDA=1, {message}" in output


@needs_compiler
@pytest.mark.parametrize(("choice", "passes"), [("auto", True), ("1", False)])
def test_an_nvcc_that_fails(project: Path, tmp_path: Path, choice: str, passes: bool) -> None:
    import torch

    if not (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
        pytest.skip("this torch is built without CUDA")
    environment = {"CUDA_HOME": _cuda_home(tmp_path, "13.0"), "NJEPA_BUILD_CUDA": "auto"}
    code, output, built = _build(project, tmp_path, choice, **environment)
    assert (code == 0) == passes
    assert built  # the CPU's comes first, and stays
    assert "no license today" in output
    assert not (tmp_path / native_build.CUDA_LIBRARY).exists()


def test_a_choice_that_contradicts_itself_is_refused(project: Path, tmp_path: Path) -> None:
    code, output, _ = _build(project, tmp_path, "0", NJEPA_BUILD_CUDA="1")
    assert code != 0
    assert "NJEPA_BUILD_CUDA=1 contradicts NJEPA_BUILD_NATIVE=0" in output
    code, output, _ = _build(project, tmp_path, "auto", NJEPA_BUILD_CUDA="2")
    assert "NJEPA_BUILD_CUDA must be auto, 0 or 1, got '2'" in output
