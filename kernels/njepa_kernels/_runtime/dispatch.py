"""Which implementation of an op runs, and why the others cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Literal

import torch

Impl = Literal["auto", "reference", "triton", "native"]

OPS = (
    *("patchify", "gather_tokens", "predictor_tokens", "jepa_loss", "vicreg", "ema_update_"),
    *("add_layer_norm", "bias_gelu", "adamw_ema_"),
)
IMPLEMENTATIONS = ("native", "triton", "reference")
#: What "auto" tries, in this order, per device type; elsewhere the reference.
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
_YES = "yes"

_found: dict[tuple[str, str, str], str] = {}
_modules: dict[tuple[str, str], ModuleType] = {}


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which also takes CPU tensors.

    Triton, too, reads this once.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_status(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting() and device_type in ("", "cpu"):
        return _YES
    if device_type == "cuda" or (device_type == "" and torch.cuda.is_available()):
        return _YES
    return "Triton kernels need a CUDA device (or TRITON_INTERPRET=1, to debug)"


def _native_status(op: str, device_type: str) -> str:
    try:
        native = importlib.import_module(".native", __package__)
    except ModuleNotFoundError:
        return "the native library is not built"
    status: str = native.available(op, device_type)
    return status


def _status(op: str, impl: str, device_type: str, wide: bool) -> str:
    """The word yes, or why ``impl`` of ``op`` cannot run there ("": on any device).

    ``wide``: an input is fp64.
    """
    if impl == "reference":
        return _YES
    if wide:
        return "float64 inputs are computed by the reference only"
    key = (op, impl, device_type)
    status = _found.get(key)
    if status is None:
        find = _triton_status(device_type) if impl == "triton" else _native_status(op, device_type)
        status = _found[key] = find
    return status


# Dynamo must not trace the search for a backend. This is torch.compiler.assume_constant_result,
# which is not called because it imports all of torch._dynamo.
_status._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available_impls() -> dict[str, dict[str, str]]:
    """For each op and each implementation: "yes", or the reason why it cannot run here."""
    return {op: {impl: _status(op, impl, "", False) for impl in IMPLEMENTATIONS} for op in OPS}


def choose(
    op: str,
    impl: str,
    device: torch.device,
    *tensors: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> str:
    """The name of the implementation that runs on ``device`` for the types of ``tensors``.

    ``dtype``: a type asked for that no input has.

    "auto" takes the first of ``PREFERENCE`` that can run; a name is taken or refused, never
    replaced.

    Raises:
        ValueError: ``impl`` is no known name.
        RuntimeError: the implementation asked for cannot run; the message says why.
    """
    wide = dtype == torch.float64
    for tensor in tensors:
        wide = wide or (tensor is not None and tensor.dtype == torch.float64)
    if impl == "auto":
        for name in PREFERENCE.get(device.type, ("reference",)):
            if _status(op, name, device.type, wide) == _YES:
                return name
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"{op}: impl must be one of {known}, got {impl!r}")
    status = _status(op, impl, device.type, wide)
    if status != _YES:
        raise RuntimeError(
            f"{op}: impl={impl!r} cannot run on {device.type}: {status}. "
            "Use impl='auto' or 'reference'."
        )
    return impl


def backend(op: str, impl: str, tensor: torch.Tensor) -> ModuleType:
    """The module with the fused kernels that a registered op calls.

    Raises RuntimeError where only the reference can run: that one is no operator of the dispatcher
    but a composition of PyTorch's, which ``njepa_kernels.<op>`` calls.
    """
    name = choose(op, impl, tensor.device, tensor)
    if name == "reference":
        raise RuntimeError(
            f"{op}: no fused implementation runs on {tensor.device.type} for {tensor.dtype}. "
            f"Call njepa_kernels.{op}, which falls back to the reference."
        )
    module = _modules.get((op, name))
    if module is None:
        file = "triton_kernel" if name == "triton" else "native"
        module = importlib.import_module(f"..ops.{op}.{file}", __package__)
        _modules[op, name] = module
    return module
