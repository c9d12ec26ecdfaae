"""The compiled libraries (csrc/), each loaded when it is first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .._version import __version__

_PACKAGE = Path(__file__).parents[1]
#: Per device type where setup.py puts its library, and the namespace of torch.ops that it fills.
#: One file serves all Python versions and torch 2.11 and later.
LIBRARIES = {
    "cpu": (_PACKAGE / "_native_cpu.so", "njepa_native"),
    "cuda": (_PACKAGE / "_native_cuda.so", "njepa_native_cuda"),
}
#: The ops that the library for CUDA holds; that for the CPU holds all.
CUDA_OPS = ("predictor_tokens", "jepa_loss", "ema_update_")
_NEEDS = {"cpu": "torch>=2.11 and g++", "cuda": "a CUDA build of torch>=2.11, g++ and nvcc>=12.8"}
_YES = "yes"

_status: dict[str, str] = {}


def how_to_build(device_type: str) -> str:
    """The command that builds the library, as part of a message."""
    choice = "NJEPA_BUILD_NATIVE=1" + (" NJEPA_BUILD_CUDA=1" if device_type == "cuda" else "")
    return (
        f"to build: {choice} pip install --no-build-isolation . in the source folder, "
        f"with {_NEEDS[device_type]} installed"
    )


def _name(device_type: str) -> str:
    return "the native library" + (" for CUDA" if device_type == "cuda" else "")


def load(path: Path | None = None, device_type: str = "cpu") -> str:
    """Load the library (at ``path``, if not where it belongs): "yes", or why that is impossible."""
    default, namespace = LIBRARIES[device_type]
    path = default if path is None else path
    name, how_to = _name(device_type), how_to_build(device_type)
    if not path.exists():
        return f"{name} is not built; {how_to}"
    try:
        torch.ops.load_library(path)
        built_for: str = getattr(torch.ops, namespace).version()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{name} does not load ({str(error).partition(chr(10))[0]}); {how_to}"
    if built_for != __version__:
        return f"{name} is of version {built_for}, not {__version__}; {how_to}"
    return _YES


def available(op: str = "", device_type: str = "") -> str:
    """The word yes, or why the native kernel of ``op`` cannot run on ``device_type``.

    "" stands for any op, and for any device: then the CPU, which every machine has.
    """
    device_type = device_type or "cpu"
    if device_type not in LIBRARIES:
        return f"the native library has no kernels for {device_type}"
    if device_type == "cuda" and op and op not in CUDA_OPS:
        return f"the native library for CUDA has no {op}, only {', '.join(CUDA_OPS)}"
    if device_type not in _status:
        _status[device_type] = load(device_type=device_type)
    status = _status[device_type]
    if status == _YES and op and not _holds(op, device_type):
        return f"{_name(device_type)} is older than {op}; {how_to_build(device_type)}"
    return status


def _holds(op: str, device_type: str) -> bool:
    """Whether a library that is loaded has ``op``: one may be older than the sources beside it."""
    library = getattr(torch.ops, LIBRARIES[device_type][1])
    return hasattr(library, op) or hasattr(library, f"{op}_forward")


def ops(device_type: str = "cpu") -> Any:
    """The ops of a library; raises RuntimeError with the reason where it is not loaded."""
    status = available(device_type=device_type)
    if status != _YES:
        raise RuntimeError(status)
    return getattr(torch.ops, LIBRARIES[device_type][1])
