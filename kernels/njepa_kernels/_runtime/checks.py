"""Argument checks. Every message names the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

INDEX = (torch.int64,)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_debug = False


def debug_checks(enabled: bool = True) -> None:
    """Also check values that live on an accelerator (index ranges), at the cost of a host sync.

    On CPU these checks always run. Elsewhere they are off by default, because reading a value makes
    the host wait. The fused kernels then read nothing for an index out of range: what it names is
    NaN, and gets no gradient (the reference asserts on the device). Turn them on while looking for
    a bug. Shape and type checks never need this switch.
    """
    global _debug
    _debug = enabled


def can_read_values(tensor: torch.Tensor) -> bool:
    """Whether a check may look at the values of ``tensor``.

    Never while compiling, nor of a subclass (FakeTensor), which may have none.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return tensor.is_cpu or (_debug and not tensor.is_meta)


def check_tensor(
    op: str,
    name: str,
    value: object,
    layout: str,
    shape: Sequence[int | None] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Check type, dtype, number of dimensions, the sizes in ``shape`` that are not None, device.

    ``layout`` is how messages write the shape, e.g. "[B,M,Kt]"; it sets the number of dimensions.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor {layout}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be {expected}, got {got}")
    if shape is None:
        shape = [None] * (layout.count(",") + 1)
    # A plain loop: these checks are a good part of the time of a small call.
    fits = value.dim() == len(shape)
    if fits:
        for size, got_size in zip(shape, value.shape, strict=True):
            if size is not None and size != got_size:
                fits = False
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must be {layout} = [{sizes}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {value.device}")


def check_index_range(op: str, name: str, idx: torch.Tensor, size: int) -> None:
    """Raise unless all of ``idx`` lies in [0, size); see ``debug_checks`` for accelerators."""
    if not can_read_values(idx) or idx.numel() == 0:
        return
    lowest, highest = torch.aminmax(idx)
    low, high = lowest.item(), highest.item()
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise ValueError(f"{op}: {name} must be int64 in [0, {size}), got {bad}")


def check_like(
    op: str, name: str, value: object, dtypes: Sequence[torch.dtype], like: torch.Tensor
) -> None:
    """Check type and dtype, and that shape and device are those of ``like``."""
    layout = "[" + ",".join("*" * like.dim()) + "]"
    check_tensor(op, name, value, layout, like.shape, dtypes=dtypes, device=like.device)


def check_rows(op: str, name: str, value: object) -> int:
    """Check that ``value`` is a floating tensor [..., D] with D > 0; returns D."""
    layout = f"{name} must be a torch.Tensor [..., D] with D of at least 1"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {layout}, got {type(value).__name__}")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{op}: {layout}, got {list(value.shape)}")
    check_tensor(op, name, value, "[...,D]", value.shape)
    return value.shape[-1]
