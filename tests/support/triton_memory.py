"""What the Triton kernels read and write, watched address by address in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


@dataclass
class Launch:
    """One launch: bytes by the name of the argument; ``outside`` of all of them: 0 is right."""

    kernel: str
    tensors: dict[str, tuple[int, int]]
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    outside: int = 0


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    start, size = tensor.data_ptr(), tensor.element_size()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


@contextmanager
def watched() -> Iterator[list[Launch]]:
    """Record every launch. An access outside of the tensors of a launch is counted, not done."""
    launches: list[Launch] = []
    run = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def call(self: Any, *args: Any, **meta: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | meta
        extents = {k: _extent(v) for k, v in named.items() if isinstance(v, torch.Tensor)}
        launches.append(Launch(self.fn.__name__, extents))
        run(self, *args, **meta)

    def count(pointers: Any, mask: Any, bytes_of: Counter[str]) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data.astype("int64")
        left = mask.data.copy()
        for name, (start, end) in launches[-1].tensors.items():
            inside = left & (addresses >= start) & (addresses + size <= end)
            bytes_of[name] += size * int(inside.sum())
            left &= ~inside
        launches[-1].outside += int(left.sum())
        return TensorHandle(mask.data & ~left, mask.dtype)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, count(pointers, mask, launches[-1].read), *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask = count(pointers, mask, launches[-1].written)
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", call)
        patch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
        yield launches
