"""Notices what would make the host wait for a GPU, on a machine that has none."""

from __future__ import annotations

import importlib
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from njepa.models.attention_kernels import FLASH_FIRST

#: Operators and methods whose result, or its shape, depends on values that the host has to read;
#: ``lift_fresh`` is what ``torch.tensor(numbers, device=...)`` ends in, a blocking copy.
READS = {
    "_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "allclose", "masked_select",
    "unique", "_unique2", "unique_consecutive", "bincount", "lift_fresh", "tolist", "numpy", "cpu",
    "__array__", "__bool__", "__float__", "__int__", "__index__", "__contains__",
}  # fmt: skip

#: The average's momentum, which hangs on the step's verdict; on a GPU the kernel reads it there.
ON_A_CPU_ONLY = " in ema.py:update_target"


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


def watch(loop: Any, steps: int) -> dict[str, Any]:
    """What the host does in ``steps`` training steps, after one step that is not watched.

    reads: device values that it reads. synchronized: calls of ``synchronize`` of DeepSpeed's
    accelerator. ordered: how often SDPA's order of backends is set. attended: calls of SDPA under
    the run's order, and under another.
    """
    from deepspeed.accelerator import get_accelerator

    # As on a GPU: the ops look at values on a CPU only, where that costs nothing.
    for module in (
        "_runtime.checks",
        "ops.ema_update_.op",
        "ops.adamw_ema_.op",
        "ops.vicreg.op",
    ):
        importlib.import_module(f"njepa_kernels.{module}").can_read_values = lambda _: False
    state = loop.setup.state
    state.attention = replace(state.attention, order=FLASH_FIRST)
    loop.advance()
    functional, get_order = torch.nn.functional, torch._C._get_sdp_priority_order
    attention, set_order = functional.scaled_dot_product_attention, torch._C._set_sdp_priority_order
    set_order([int(backend) for backend in reversed(FLASH_FIRST)])
    reads, attended = HostReads(), [0, 0]

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        attended[get_order()[0] != int(FLASH_FIRST[0])] += 1
        return attention(*args, **kwargs)

    with (
        mock.patch.object(get_accelerator(), "synchronize") as synchronize,
        mock.patch.object(torch._C, "_set_sdp_priority_order", side_effect=set_order) as ordered,
        mock.patch.object(functional, "scaled_dot_product_attention", attend),
    ):
        for _ in range(steps):
            with reads:
                loop.advance()
    loop.setup.close()
    return {
        "reads": sorted(read for read in reads.seen if not read.endswith(ON_A_CPU_ONLY)),
        "synchronized": synchronize.call_count,
        "ordered": ordered.call_count,
        "attended": attended,
    }
