"""The module of every operator, forward and backward, against where the code says it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from njepa.planning.module_paths import ModulePaths


class Pair(NamedTuple):
    branch: Tensor
    stream: Tensor


class Layer(nn.Module):
    """Leaves its addition to whoever comes next, and so returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.Tanh()

    def forward(self, given: Pair) -> Pair:
        x = given.stream + given.branch
        return Pair(self.act(self.fc(x)), x)


class Net(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.layers, self.recompute = nn.ModuleList(Layer() for _ in range(2)), recompute

    def forward(self, x: Tensor) -> Tensor:
        given = Pair(x, x)
        for layer in self.layers:
            given = (
                checkpoint(layer, given, use_reentrant=False) if self.recompute else layer(given)
            )
        return given.branch.mul(given.stream)


class Seen(TorchDispatchMode):
    def __init__(self, paths: ModulePaths) -> None:
        super().__init__()
        self.paths, self.found = paths, list[tuple[str, str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(
            (str(func._overloadpacket).removeprefix("aten."), self.paths.at_operator())
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_operators_are_of_the_module_whose_code_made_them(recompute: bool) -> None:
    x, net = torch.randn(3, 4, requires_grad=True), Net(recompute)
    paths = ModulePaths()
    seen = Seen(paths)
    with paths, seen:
        loss = net(x).sum()
        forward = list(seen.found)
        seen.found.clear()
        loss.backward()
    forward = [item for item in forward if item[0] in ("add", "addmm", "tanh", "mul", "sum")]
    layers = [f"Net.layers.{i}" for i in range(2)]

    def made(layer: str) -> list[tuple[str, str]]:
        return [("add", layer), ("addmm", f"{layer}.fc"), ("tanh", f"{layer}.act")]

    assert forward == [*made(layers[0]), *made(layers[1]), ("mul", "Net"), ("sum", "")]
    backward = [item for item in seen.found if item[0] in ("tanh_backward", "mm", "sum", "mul")]
    assert backward == [("mul", "Net"), ("mul", "Net")] + [
        item for layer in reversed(layers)
        for item in [("tanh_backward", f"{layer}.act"), *[("mm", f"{layer}.fc")] * 2,
                     ("sum", f"{layer}.fc")]
    ]  # fmt: skip
    again = [item for item in seen.found if item[0] in ("addmm", "tanh")]
    assert again == (
        [x for layer in reversed(layers) for x in made(layer)[1:]] if recompute else []
    )
