"""The optional native library (csrc/): C++ for CPU, on torch's stable ABI, for any Python.

NJEPA_BUILD_NATIVE=auto  build it if torch and a compiler are at hand, else say how to (default)
                   1     build it or fail
                   0     do not build it

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

SOURCES = Path(__file__).resolve().parent / "csrc" / "cpu"
OPS = ("library", "loss", "patchify", "tokens", "vicreg")  # see torch's headers
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


def find_compiler() -> list[str] | None:
    """The C++ compiler: $CXX, else g++ or c++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(([name] for name in ("g++", "c++") if shutil.which(name)), None)


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


def package_version() -> str:
    text = (SOURCES.parents[1] / "kernels" / "njepa_kernels" / "_version.py").read_text()
    return text.split('"')[1]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} failed with {done.returncode}:\n{done.stderr}")


def build_library(output: Path) -> None:
    """Compile csrc/cpu, each instruction set on its own, and link it all into ``output``."""
    compiler, torch = find_compiler(), find_torch()
    assert compiler is not None
    assert torch is not None
    headers = ["-isystem", str(torch / "include"), f'-DNJEPA_VERSION="{package_version()}"']
    headers += [f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"]
    units = [(name, name, headers) for name in OPS]
    for name, flags in INSTRUCTION_SETS.items():
        units.append((name, "isa", [f"-DNJEPA_ISA={name}", *flags]))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{name}.o")) for name, _, _ in units]
        commands = [
            [*compiler, *FLAGS, *flags, "-c", str(SOURCES / f"{source}.cpp"), "-o", target]
            for (_, source, flags), target in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        # Linked beside the final name, then renamed: a process may have the old one loaded.
        fresh = output.with_suffix(f".{os.getpid()}.tmp")
        link = [*compiler, "-shared", *objects, "-o", str(fresh)]
        run([*link, f"-L{torch / 'lib'}", "-ltorch_cpu"])
        fresh.replace(output)


class BuildNative(build_ext):
    """build_ext for a library that is no Python module: one plain file name, our own flags."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        build_library(Path(self.get_ext_fullpath(ext.name)))


class AnyPythonWheel(bdist_wheel):
    """The library depends on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return ("py3", "none", platform_tag)


def native_extensions() -> list[Extension]:
    choice = os.environ.get("NJEPA_BUILD_NATIVE", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"NJEPA_BUILD_NATIVE must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return []
    reason = obstacle()
    if reason is None:
        sources = [f"csrc/cpu/{path.name}" for path in sorted(SOURCES.glob("*.cpp"))]
        headers = [f"csrc/cpu/{path.name}" for path in sorted(SOURCES.glob("*.h"))]
        name = "njepa_kernels._native_cpu"
        return [Extension(name, sources, depends=headers, optional=choice == "auto")]
    if choice == "1":
        raise SystemExit(f"njepa: NJEPA_BUILD_NATIVE=1, but {reason}. To build: {HOW_TO}")
    print(f"njepa: without the native library, because {reason}. To build: {HOW_TO}")
    return []


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
