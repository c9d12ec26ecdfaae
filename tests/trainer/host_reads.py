"""Notices what would make the host wait for a GPU, on a machine that has none."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators and methods whose result, or its shape, depends on values that the host has to read;
#: ``lift_fresh`` is what ``torch.tensor(numbers, device=...)`` ends in, a blocking copy.
READS = {
    "_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "allclose", "masked_select",
    "unique", "_unique2", "unique_consecutive", "bincount", "lift_fresh", "tolist", "numpy", "cpu",
    "__array__", "__bool__", "__float__", "__int__", "__index__", "__contains__",
}  # fmt: skip


class HostReads(TorchDispatchMode):
    """While active, ``seen`` collects "operator in file:function", innermost caller outside torch;
    the file is "deepspeed" for all of that package.

    ``TorchFunctionMode`` alone would miss what C++ calls, ``TorchDispatchMode`` alone what never
    reaches an operator on a CPU (``numpy``, ``tolist``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._functions = _Functions(self)

    def __enter__(self) -> HostReads:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS or (name.startswith("index") and _boolean(args[1:2])):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        frames = traceback.extract_stack()
        outside = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
        where = outside[-1]
        package = "deepspeed" if "/deepspeed/" in where.filename else Path(where.filename).name
        self.seen.add(f"{name} in {package}:{where.name}")


class _Functions(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self._reads.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _boolean(indices: Any) -> bool:
    return any(
        isinstance(i, torch.Tensor) and i.dtype == torch.bool
        for group in indices
        for i in (group if isinstance(group, (list, tuple)) else [group])
    )


def reads_of(trainer: Any, steps: int) -> tuple[list[str], int]:
    """What ``steps`` training steps read, after one step that is not watched, and how often they
    call ``synchronize`` of DeepSpeed's accelerator."""
    from deepspeed.accelerator import get_accelerator

    # As on a GPU: the ops look at values on a CPU only, where that costs nothing.
    for module in ("_checks", "ema_update_.op", "vicreg.op"):
        importlib.import_module(f"njepa_kernels.{module}").can_read_values = lambda _: False
    batches = iter(trainer.loader)
    trainer._train_step(batches)
    reads = HostReads()
    with mock.patch.object(get_accelerator(), "synchronize") as synchronize:
        for _ in range(steps):
            with reads:
                trainer._train_step(batches)
            trainer.step += 1
    trainer.loader.close()
    trainer.close()
    return sorted(reads.seen), synchronize.call_count
