"""The optional native libraries (csrc/): C++ for CPU and CUDA on torch's stable ABI, any Python.

NJEPA_BUILD_NATIVE=auto  build them if torch and a compiler are at hand, else say how to (default)
                   1     build them or fail
                   0     do not build them
NJEPA_BUILD_CUDA=auto|0|1  the same for the library for CUDA alone, which needs nvcc but no GPU

With both at auto, or NJEPA_BUILD_NATIVE=1, a machine without nvcc gets the library for CPU.
pip must not isolate the build from torch: pip install -e . --no-build-isolation
Alone, into the source folder: python setup.py build_ext --inplace
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
VERSION = ROOT / "kernels" / "njepa_kernels" / "_version.py"
OLDEST_TORCH = (2, 11)  # the library runs with this and any later version, whatever built it
HOW_TO = (
    "NJEPA_BUILD_NATIVE=1 pip install --no-build-isolation . "
    "in the source folder, with torch>=2.11 and g++ installed"
)

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]
AVX512 += ["-mprefer-vector-width=512"]
X86 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = {"baseline": [], **({"avx2": AVX2, "avx512": AVX512} if X86 else {})}

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
# g++ 12 warns about its own intrinsics.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS += ["-DNJEPA_X86"] if X86 else []

# A100, H100 and H200, B200; what comes after compiles the PTX of the last when it loads.
ARCHITECTURES = (80, 90, 100)
OLDEST_NVCC = (12, 8)  # the first that knows sm_100


def find_compiler() -> list[str] | None:
    """The C++ compiler: $CXX, else g++ or c++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(([name] for name in ("g++", "c++") if shutil.which(name)), None)


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, else of the PATH, else of /usr/local/cuda."""
    if os.environ.get("CUDA_HOME"):
        places = [os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc")]
    else:
        places = ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((Path(found) for found in map(shutil.which, places) if found), None)


def find_torch() -> Path | None:
    """The folder of torch, which is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec else None


def obstacle() -> str | None:
    """Why the library cannot be built here, or None."""
    if sys.platform != "linux":
        return f"only Linux is supported, this is {sys.platform}"
    torch = find_torch()
    if torch is None:
        return "torch is not installed where the build runs"
    found = re.search(r"^__version__.*?(\d+)\.(\d+)", (torch / "version.py").read_text(), re.M)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        return f"torch>=2.11 is needed, found {found[0] if found else 'no version'}"
    compiler = find_compiler()
    if compiler is None or shutil.which(compiler[0]) is None:
        return "no C++ compiler was found (g++, c++ or $CXX)"
    return None


def cuda_obstacle() -> str | None:
    """Why the library for CUDA cannot be built where that for the CPU can, or None."""
    nvcc = find_nvcc()
    if nvcc is None:
        home = os.environ.get("CUDA_HOME")
        searched = f"$CUDA_HOME={home}" if home else "the PATH and /usr/local/cuda"
        return f"no nvcc was found in {searched}"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_NVCC:
        return f"nvcc>=12.8 is needed, {nvcc} is {found[0] if found else 'of no known version'}"
    torch = find_torch()
    assert torch is not None
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built without CUDA"
    return None


def package_version() -> str:
    return VERSION.read_text().split('"')[1]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} failed with {done.returncode}:\n{done.stderr}")


def torch_flags() -> list[str]:
    torch = find_torch()
    target = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
    flags = ["-isystem", str(torch / "include"), f'-DNJEPA_VERSION="{package_version()}"']
    return [*flags, f"-DTORCH_TARGET_VERSION={target}"]


def cpu_commands() -> list[list[str]]:
    """Each instruction set is compiled on its own."""
    compile_ = [*find_compiler(), *FLAGS]
    isa = SOURCES / "cpu" / "isa.cpp"
    commands = [
        [*compile_, *torch_flags(), "-c", str(unit)]
        for unit in sorted(isa.parent.glob("*.cpp"))
        if unit != isa
    ]
    for name, flags in INSTRUCTION_SETS.items():
        commands.append([*compile_, f"-DNJEPA_ISA={name}", *flags, "-c", str(isa)])
    return commands


def nvcc_command() -> list[str]:
    compiler = find_compiler()
    # nvcc takes a program, not a command such as "ccache g++".
    host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
    return [str(find_nvcc()), *host, "-cudart", "static"]


def cuda_commands() -> list[list[str]]:
    """nvcc for the kernels, the C++ compiler for what meets torch."""
    nvcc = [*nvcc_command(), "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    for arch in ARCHITECTURES:
        code = f"[sm_{arch},compute_{arch}]" if arch == ARCHITECTURES[-1] else f"sm_{arch}"
        nvcc += ["-gencode", f"arch=compute_{arch},code={code}"]
    host = [*find_compiler(), *FLAGS, *torch_flags(), "-DUSE_CUDA"]
    units = sorted((SOURCES / "cuda").iterdir())
    compilers = {".cu": nvcc, ".cpp": host}
    return [[*compilers[u.suffix], "-c", str(u)] for u in units if u.suffix in compilers]


def build_library(
    output: Path, commands: list[list[str]], linker: list[str], libraries: list[str]
) -> None:
    """Run the compilers side by side and link all objects into ``output``."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{i}.o")) for i in range(len(commands))]
        whole = [[*command, "-o", o] for command, o in zip(commands, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, whole))
        # Linked beside the final name, then renamed: a process may have the old one loaded.
        fresh = output.with_suffix(f".{os.getpid()}.tmp")
        run([*linker, "-shared", *objects, "-o", str(fresh), *libraries])
        fresh.replace(output)


class BuildNative(build_ext):
    """build_ext for a library that is no Python module: one plain file name, our own flags."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        if not (self.force or newer_group([*ext.sources, *ext.depends], str(output))):
            return
        libraries = [f"-L{find_torch() / 'lib'}", "-ltorch_cpu"]
        if ext.name.endswith("_cpu"):
            build_library(output, cpu_commands(), find_compiler(), libraries)
        else:
            # The runtime is linked in, and hidden: torch has its own, of any version.
            libraries += ["-ltorch_cuda", "-Xlinker", "--exclude-libs,ALL"]
            build_library(output, cuda_commands(), nvcc_command(), libraries)


class AnyPythonWheel(bdist_wheel):
    """The library depends on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return ("py3", "none", platform_tag)


def switch(name: str) -> str:
    choice = os.environ.get(name, "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {choice!r}")
    return choice


def extension(device: str, optional: bool) -> Extension:
    files = [SOURCES / "common", SOURCES / device]
    found = sorted(str(p.relative_to(ROOT)) for folder in files for p in folder.iterdir())
    sources = [name for name in found if not name.endswith(".h")]
    depends = [*(name for name in found if name.endswith(".h")), "setup.py"]
    depends.append(str(VERSION.relative_to(ROOT)))
    return Extension(f"njepa_kernels._native_{device}", sources, depends=depends, optional=optional)


def native_extensions() -> list[Extension]:
    choice, cuda = switch("NJEPA_BUILD_NATIVE"), switch("NJEPA_BUILD_CUDA")
    if choice == "0":
        if cuda == "1":
            raise SystemExit("NJEPA_BUILD_CUDA=1 contradicts NJEPA_BUILD_NATIVE=0: change one")
        return []
    reason = obstacle()
    if reason is not None:
        if "1" in (choice, cuda):
            name = "NJEPA_BUILD_NATIVE" if choice == "1" else "NJEPA_BUILD_CUDA"
            raise SystemExit(f"njepa: {name}=1, but {reason}. To build: {HOW_TO}")
        print(f"njepa: without the native library, because {reason}. To build: {HOW_TO}")
        return []
    found = [extension("cpu", optional=choice == "auto")]
    if cuda == "0":
        return found
    reason = cuda_obstacle()
    if reason is None:
        return [*found, extension("cuda", optional="1" not in (choice, cuda))]
    if cuda == "1":
        raise SystemExit(f"njepa: NJEPA_BUILD_CUDA=1, but {reason}")
    print(f"njepa: without the native library for CUDA, because {reason}")
    return found


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
