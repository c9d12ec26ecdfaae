"""The compiled library (csrc/), loaded when it is first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ._version import __version__

#: Where setup.py puts it. One file serves all Python versions and torch 2.11 and later.
LIBRARY = Path(__file__).with_name("_native_cpu.so")
HOW_TO_BUILD = (
    "to build: NJEPA_BUILD_NATIVE=1 pip install --no-build-isolation . in the source folder, "
    "with torch>=2.11 and g++ installed"
)
_YES = "yes"

_status: str | None = None


def load(path: Path = LIBRARY) -> str:
    """Load the library at ``path``: "yes", or why that is impossible."""
    if not path.exists():
        return f"the native library is not built; {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(path)
        built_for: str = torch.ops.njepa_native.version()
    except (OSError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        return f"the native library does not load ({reason}); {HOW_TO_BUILD}"
    if built_for != __version__:
        return f"the native library is of version {built_for}, not {__version__}; {HOW_TO_BUILD}"
    return _YES


def available(op: str = "", device_type: str = "") -> str:
    """The word yes, or why the native kernels cannot run on ``device_type`` ("": on any).

    The library holds all ops, so ``op`` makes no difference.
    """
    global _status
    if device_type not in ("", "cpu"):
        return f"the native library has no kernels for {device_type}"
    if _status is None:
        _status = load()
    return _status


def ops() -> Any:
    """``torch.ops.njepa_native``; raises RuntimeError with the reason where it is not loaded."""
    status = available()
    if status != _YES:
        raise RuntimeError(status)
    return torch.ops.njepa_native
