"""Counts what DeepSpeed moves beside autograd: copies, flattening, scaling, reductions."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class EngineBytes(TorchDispatchMode):
    """While active, sums the bytes read and written by operators that DeepSpeed itself calls.

    Attributes:
        moved: bytes by operator; views and memory that is only allocated are free.
        reduced: bytes handed to collective calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()
        self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _called_by_deepspeed():
            name, given, made = str(func), _tensors((args, kwargs)), _tensors(result)
            if func.namespace == "c10d":
                self.reduced += sum(t.nbytes for t in given)
            elif func._schema.is_mutable:
                self.moved[name] += sum(t.nbytes for t in given)
            elif not (name.startswith("aten.empty") or _same_memory(given, made)):
                self.moved[name] += sum(t.nbytes for t in given + made)
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _same_memory(given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
    old = {t.untyped_storage().data_ptr() for t in given}
    return all(t.untyped_storage().data_ptr() in old for t in made)


def _called_by_deepspeed() -> bool:
    """Whether the innermost caller outside of torch is; autograd's own calls do not count."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("torch/autograd/graph.py"):
            return False
        if name != __file__ and "/torch/" not in name:
            return "/deepspeed/" in name
        frame = frame.f_back
    return False
