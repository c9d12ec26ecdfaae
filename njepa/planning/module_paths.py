"""Which module an operator is of: in the forward the one that runs, in the backward its node's.

Autograd numbers its nodes as it makes them, each right before the operator that it is of. So the
operator of a node is the first one that was seen with a higher number to come.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


class ModulePaths:
    """Paths as ``TrainModule.jepa.encoder.blocks.0.mlp.fc1``; hooks all modules inside ``with``."""

    def __init__(self) -> None:
        self._names: dict[nn.Module, str] = {}
        self._running: list[str] = []
        self._numbers: list[int] = []
        self._paths: list[str] = []
        self._last = ""

    def __enter__(self) -> ModulePaths:
        self._hooks = (
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        if module not in self._names:
            root = type(module).__name__
            for name, inner in module.named_modules():
                self._names.setdefault(inner, f"{root}.{name}" if name else root)
        self._running.append(self._names[module])

    def _end(self, *_: Any) -> None:
        self._running.pop()

    def at_operator(self) -> str:
        """Of the operator that is about to run; "" outside of all modules. Call it for each."""
        learns = torch.is_grad_enabled()
        node = None if learns else torch._C._current_autograd_node()
        if node is None:
            if learns or self._running:  # else gradients are summed between two nodes
                self._last = self._running[-1] if self._running else ""
            if learns:  # also what checkpointing computes again
                self._numbers.append(torch._C._autograd._get_sequence_nr())
                self._paths.append(self._last)
        elif node.name() != "torch::autograd::AccumulateGrad":
            at = bisect_right(self._numbers, node._sequence_nr())
            self._last = self._paths[at] if at < len(self._paths) else ""
        return self._last
