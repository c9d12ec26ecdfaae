"""How Triton kernels are launched, or what would be launched is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A recorded launch: what a kernel would have been called with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


@dataclass
class _Recorder:
    arch: int
    launches: list[Launch]


_recorder: _Recorder | None = None


@contextmanager
def record_launches(arch: int) -> Iterator[list[Launch]]:
    """Collect launches (for ``arch``, e.g. 90) instead of running them; meta tensors will do."""
    global _recorder
    _recorder = _Recorder(arch, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run ``kernel`` on the device of its first argument; an empty grid runs nothing."""
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, args, meta))
    elif 0 not in grid:
        device = args[0].device
        if device.type == "cuda":
            with torch.cuda.device(device):
                kernel[grid](*args, **meta)
        else:
            kernel[grid](*args, **meta)


def architecture(device: torch.device) -> int:
    """Compute capability as one number, e.g. 90."""
    if _recorder is not None:
        return _recorder.arch
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def as_int32(value: int) -> int:
    """The int32 with the low 32 bits of ``value``, so that a kernel is compiled for one type."""
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >= 1 << 31 else low
