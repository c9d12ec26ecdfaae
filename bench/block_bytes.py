"""What a transformer block moves besides its products: eager, compiled, fused, fused and compiled.

    python -m bench.block_bytes [--tokens 784] [--width 384]

Forward and backward under bf16 autocast, in bytes per token and channel. Operators that run are
seen by a dispatch mode, compiled kernels are those of torch._inductor's own count; either way a
kernel moves each of its inputs and outputs once. Products are matrix products and attention: they
move the same bytes in all columns. Weights are bf16 already, so that no cast of them is counted.
No time is measured.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from njepa.models.architecture import Stack
from njepa.models.attention import SDPA
from njepa.models.block import FusedBlock, Pending, build_blocks

_PRODUCTS = ("mm", "addmm", "bmm", "linear", "attention")
#: Nothing but another view of the same memory, or no data at all.
_FREE = ("view", "unsafe_view", "reshape", "transpose", "permute", "expand", "slice", "select",
         "unbind", "detach", "alias", "squeeze", "unsqueeze", "split", "t.", "as_strided", "empty",
         "new_empty")  # fmt: skip


def _kind(name: str) -> str:
    return "products" if any(part in name for part in _PRODUCTS) else "rest"


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved = {"products": 0, "rest": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2] + "."
        if not name.lstrip("_").startswith(_FREE):
            touched = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.moved[_kind(name)] += sum(t.nbytes for t in touched if isinstance(t, Tensor))
        return out


def _step(block: nn.Module, x: Tensor, low: Tensor) -> None:
    """As one of many: a fused block gets the pending sum of the one before, and returns its own."""
    fused = isinstance(block, FusedBlock)
    given = (low, x) if fused else (x,)
    for tensor in given:
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(Pending(*given) if fused else x, SDPA.sequences(1, x.shape[1]))
    torch.autograd.backward(out, [tensor.detach() for tensor in given])


def count(tokens: int, width: int, fused: bool, compiled: bool) -> dict[str, float]:
    """Bytes per token and channel of one block, of products and of the rest."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, width)
    low = x.bfloat16()
    (block,) = build_blocks(Stack(width, 1, width // 64, 4 * width), fused, "auto")
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            layer.bfloat16()
    if compiled:
        moved = _compiled(block, x, low)
    else:
        with _Operators() as seen:
            _step(block, x, low)
        moved = seen.moved
    return {kind: bytes_ / (tokens * width) for kind, bytes_ in moved.items()}


def _compiled(block: nn.Module, x: Tensor, low: Tensor) -> dict[str, int]:
    import torch._dynamo
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx, config, metrics

    torch._dynamo.reset()
    metrics.reset()
    moved = {"products": 0, "rest": 0}
    log = compile_fx.inductor_metrics_log
    level = log.level
    log.setLevel(logging.INFO)  # it counts for its log only, and a graph out of a cache not at all
    log.disabled, log.propagate = False, False
    try:
        with (
            config.patch(fx_graph_cache=False),
            functorch_config.patch(enable_autograd_cache=False),
        ):
            block.compile(fullgraph=True)
            _step(block, x, low)
    finally:
        log.setLevel(level)
    for node, elements in metrics.nodes_num_elem:  # in units of four bytes
        kernel = getattr(node, "node", None)
        name = str(getattr(kernel, "op_overload", "") or getattr(kernel, "python_kernel_name", ""))
        moved[_kind(name)] += 4 * elements
    assert sum(moved.values()), "torch._inductor counted nothing"
    return moved


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.block_bytes", description=__doc__)
    parser.add_argument("--tokens", type=int, default=784)
    parser.add_argument("--width", type=int, default=384)
    given = parser.parse_args(arguments)
    for fused in (False, True):
        for compiled in (False, True):
            found = count(given.tokens, given.width, fused, compiled)
            name = f"{'fused' if fused else 'plain'} {'compiled' if compiled else 'eager'}"
            sys.stdout.write(
                f"{name:16} rest {found['rest']:6.1f}   products {found['products']:6.1f}\n"
            )


if __name__ == "__main__":
    main()
