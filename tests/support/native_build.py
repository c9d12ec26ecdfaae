"""Running setup.py of a copy of the project, as the build tests and the kernel tests do."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import ROOT

LIBRARY = Path("njepa_kernels", "_native_cpu.so")
CUDA_LIBRARY = LIBRARY.with_name("_native_cuda.so")
EMULATED_LIBRARY = "emulated.so"
EMULATION = ROOT / "tests" / "ops" / "cuda_emulation"


def no_compiler() -> str | None:
    """Why nothing can be built here, or None."""
    if os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++"):
        return None
    return "the native library is not built and there is no C++ compiler to build it"


def no_nvcc() -> str | None:
    """Why the library for CUDA cannot be built here, or None; what setup.py asks, in short."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    if not any(map(shutil.which, places)):
        return "the native library for CUDA is not built and there is no nvcc to build it"
    return no_compiler()


def copy_of_the_project(folder: Path) -> Path:
    """What setup.py needs, without build products."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("csrc", "kernels", "njepa"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    (folder / "README.md").write_text("njepa\n")
    return folder


def run_setup(
    folder: Path, *arguments: str, choice: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """python setup.py ... in ``folder`` with NJEPA_BUILD_NATIVE=choice.

    Without the library for CUDA, which takes minutes, unless NJEPA_BUILD_CUDA is given.
    """
    env = {k: v for k, v in os.environ.items() if k != "NJEPA_BUILD_NATIVE"}
    env |= {"NJEPA_BUILD_CUDA": "0"} | environment
    if choice is not None:
        env["NJEPA_BUILD_NATIVE"] = choice
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False
    )


def build_library(folder: Path) -> Path:
    """The freshly compiled library, below ``folder``."""
    project = copy_of_the_project(folder / "project")
    done = run_setup(project, "build_ext", "--build-lib", str(folder / "lib"), choice="1")
    assert done.returncode == 0, done.stderr
    return folder / "lib" / LIBRARY


def build_cuda_library(folder: Path) -> Path:
    """The same for CUDA."""
    project = copy_of_the_project(folder / "project")
    where = ("build_ext", "--build-lib", str(folder / "lib"))
    done = run_setup(project, *where, choice="1", NJEPA_BUILD_CUDA="1")
    assert done.returncode == 0, done.stderr
    return folder / "lib" / CUDA_LIBRARY


def compile_emulated(*arguments: str) -> None:
    """The C++ compiler with the emulation of CUDA on its path, and checks of what is undefined."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    # A misaligned 16-byte access, say, ends the process with a message.
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-I", str(EMULATION)]
    done = subprocess.run(
        [*compiler, *flags, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def build_emulated_library(folder: Path) -> Path:
    """csrc/cuda for the CPU: the kernels in the emulation, the ops as torch.ops.<...>_emulated."""
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    sources = ROOT / "csrc" / "cuda"
    include = ["-isystem", str(torch / "include"), "-DNJEPA_EMULATED", '-DNJEPA_VERSION="0"']
    include.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
    units = [["-x", "c++", "-c", str(unit)] for unit in sorted(sources.glob("*.cu"))]
    units += [[*include, "-c", str(unit)] for unit in sorted(sources.glob("*.cpp"))]
    units.append(["-c", str(EMULATION / "watch.cpp")])
    objects = [str(folder / f"{i}.o") for i in range(len(units))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda u, o: compile_emulated(*u, "-o", o), units, objects))
    library = folder / EMULATED_LIBRARY
    link = ["-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    compile_emulated(*link)
    return library
