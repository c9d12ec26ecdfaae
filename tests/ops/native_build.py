"""Running setup.py of a copy of the project, as the build tests and the kernel tests do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path("njepa_kernels", "_native_cpu.so")


def no_compiler() -> str | None:
    """Why nothing can be built here, or None."""
    if os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++"):
        return None
    return "the native library is not built and there is no C++ compiler to build it"


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
    """python setup.py ... in ``folder`` with NJEPA_BUILD_NATIVE=choice."""
    env = {k: v for k, v in os.environ.items() if k != "NJEPA_BUILD_NATIVE"} | environment
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
