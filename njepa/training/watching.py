"""Where in a step the first number appears that is not finite: module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FirstNotFinite:
    """What ``watch`` saw, in the order of execution; empty strings: all was finite."""

    def __init__(self) -> None:
        self.output = ""
        """The module whose output was not finite first."""
        self.gradient = ""
        """The module whose backward was the first to meet a gradient that is not finite."""
        self.parameters: list[str] = []
        """Parameters whose gradient of a micro-batch was not finite."""


@contextmanager
def watch(modules: dict[str, nn.Module]) -> Iterator[FirstNotFinite]:
    """Look at every output and gradient of the modules in the block; reads on the host."""
    seen, handles = FirstNotFinite(), []
    for root, module in modules.items():
        for name, inner in module.named_modules():
            if not any(True for _ in inner.children()):
                handles.append(inner.register_forward_hook(_output_hook(seen, f"{root}.{name}")))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(_gradient_hook(seen, f"{root}.{name}")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(seen: FirstNotFinite, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if seen.output or finite(output):
            return
        seen.output = name
        if not finite(inputs):
            seen.output += ", whose input is not finite: a step between two modules made it"
        bad = [key for key, p in module.named_parameters(recurse=False) if not finite(p)]
        largest = max((float(p.abs().max()) for p in module.parameters(recurse=False)), default=0)
        if bad:
            seen.output += f" (its {', '.join(bad)} are not finite)"
        elif largest:
            seen.output += f" (its weights are finite, the largest is {largest:.3g})"

    return hook


def _gradient_hook(seen: FirstNotFinite, name: str) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if not finite(gradient):
            seen.gradient = seen.gradient or name.rpartition(".")[0]
            if name not in seen.parameters:
                seen.parameters.append(name)

    return hook


def finite(value: Any) -> bool:
    """Whether all numbers in tensors, and in tuples of them, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())
    if isinstance(value, (tuple, list)):
        return all(finite(item) for item in value)
    return True
