"""Where the time of a step goes, predicted: what it must move, what the code moves, and when.

A kernel takes the longer of two times, its FLOPs at the rate of matrix products and its bytes at
that of the memory; a step is their sum. No latency, no wait for the host. Products in fp8 have
twice the rate of those in bf16, which is what vendors say.

What must be moved is a lower bound, with ideal fusion: matrix products and attention read their
operands and write their results once, in the type of autocast; all that is elementwise, a norm, a
cast or a reduction happens inside of them, except that a residual addition reads the stream, and
the backward of a norm the norm's input, once more. The fused ops, AdamW (28 bytes a parameter) and
the average (8, with bf16 copies 10; the weights are in registers then) move what they move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from njepa.planning.step_trace import Operator
from njepa.planning.time import Gpu

_FP8 = "_scaled_mm"
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", _FP8}
_COPIES = {
    "stack", "cat", "clone", "copy_", "slice_backward", "select_backward", "constant_pad_nd",
    "repeat", "embedding", "index_select", "gather", "zeros", "zeros_like", "ones_like", "full",
}  # fmt: skip
_LAYERS = {"qkv": "qkv", "fc1": "MLP fc1", "fc2": "MLP fc2"}

#: In the order of the table.
PHASES = (
    "target encoder", "context encoder", "predictor", "noise predictor", "loss", "vicreg",
    "optimizer", "EMA", "monitors",
)  # fmt: skip
PARTS = (
    "qkv", "attention", "attention proj", "MLP fc1", "MLP fc2", "other products", "norm",
    "residual", "GELU", "casts", "copies", "bias gradients", "fused ops", "AdamW", "other",
)  # fmt: skip


class Sum(NamedTuple):
    """Of some operators. Seconds are predicted."""

    launches: int
    flops: float
    must: float
    """Bytes, with ideal fusion."""
    moved: float
    """Bytes, by the code as it is."""
    seconds: float
    ideal: float
    """Seconds of the FLOPs and of the bytes that must be moved, whichever is longer."""

    def plus(self, other: Sum) -> Sum:
        launches, *numbers = (a + b for a, b in zip(self, other, strict=True))
        return Sum(int(launches), *numbers)


NOTHING = Sum(0, 0.0, 0.0, 0.0, 0.0, 0.0)


class Rates(NamedTuple):
    """What kernels reach."""

    flops: float
    """FLOP/s of matrix products."""
    bandwidth: float
    """Bytes/s of the memory."""

    @classmethod
    def of(cls, gpu: Gpu, efficiency: float) -> Rates:
        return cls(gpu.flops * efficiency, gpu.bandwidth)


def part_of(operator: Operator) -> str:
    """Which of ``PARTS`` an operator is."""
    library, _, name = operator.name.partition(".")
    leaf = operator.module.rpartition(".")[2]
    in_block = "blocks." in operator.module
    if library == "njepa":
        parts = {"add_layer_norm": "norm", "bias_gelu": "GELU", "adamw_ema_": "AdamW"}
        return parts.get(name.removesuffix("_backward"), "fused ops")
    if name in _PRODUCTS:
        own = "attention proj" if operator.module.endswith("attn.proj") else "other products"
        return _LAYERS.get(leaf, own)
    if "attention" in name:
        return "attention"
    if name.startswith("native_layer_norm"):
        return "norm"
    if name.startswith("gelu"):
        return "GELU"
    if name == "_to_copy":
        return "casts"
    if name == "_fused_adamw_":
        return "AdamW"
    if name in ("add", "add_") and in_block:
        return "residual"
    if name == "sum" and operator.backward:
        return "bias gradients"
    return "copies" if name in _COPIES else "other"


def must_move(operator: Operator, low: bool) -> float:
    """Bytes with ideal fusion; see the head of this file. ``low``: bf16 autocast."""
    part, width = part_of(operator), 2 if low else 4
    moved = operator.cost.read + operator.cost.written
    if part in ("attention", "AdamW") or operator.name.endswith(_FP8):
        return moved
    if part == "fused ops":
        # The average reads the weights where AdamW has them: 8 of its 12 bytes, 10 of 14.
        return moved * (5 / 7 if low else 2 / 3) if operator.phase == "EMA" else moved
    if operator.name.partition(".")[2] in _PRODUCTS:
        return width * (sum(operator.inputs) + sum(operator.outputs))
    if operator.name.startswith("njepa.add_layer_norm"):
        # The addition where there is a residual, or a gradient of it, and the norm's backward.
        added = len(operator.inputs) == (5 if operator.backward else 4)
        return width * operator.outputs[0] * (added + operator.backward)
    if part == "residual" or (part == "norm" and operator.backward):
        return width * sum(operator.outputs[:1])
    return 0.0


def sums(
    operators: Iterable[Operator], key: Callable[[Operator], str], rates: Rates, low: bool
) -> dict[str, Sum]:
    """The sums of all operators with the same ``key``."""
    found: dict[str, Sum] = {}
    for operator in operators:
        cost, must = operator.cost, must_move(operator, low)
        moved = float(cost.read + cost.written)
        compute = cost.flops / rates.flops / (2 if operator.name.endswith(_FP8) else 1)
        one = Sum(
            cost.launches, float(cost.flops), must, moved,
            max(compute, moved / rates.bandwidth), max(compute, must / rates.bandwidth),
        )  # fmt: skip
        found[key(operator)] = found.get(key(operator), NOTHING).plus(one)
    return found


def phase_of(operator: Operator) -> str:
    """``predictor``, or ``predictor, backward``."""
    return operator.phase + (", backward" if operator.backward else "")
