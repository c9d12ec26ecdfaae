"""What an operator of torch moves, computes and launches: from its arguments, as a GPU runs it.

Eager kernels read every input once and write every output once, and nothing stays in a cache
between two of them; views are free. The exceptions are the tables of this file. Nothing here reads
a value, so tensors without data will do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

#: Give memory and do not touch it, or read a number on the host.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "device",
    "lift_fresh", "_local_scalar_dense", "detach", "_assert_async",
}  # fmt: skip
#: Do not read what they write into.
_WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
#: Arguments that are written and not read.
_COPIES = {"shadow", "params_bf16", "targets_bf16"}
#: Of the named argument they read the rows that an index names, no more than they write.
_GATHERS = {
    "embedding": "weight", "gather": "self", "index_select": "self", "index": "self",
    "patchify": "images", "gather_tokens": "x", "predictor_tokens": "pos",
}  # fmt: skip
#: Operators of several kernels. Flash attention's backward: the products of rows, the gradients,
#: that of q to its type. Ours: test_step_budget.py compares with what they launch.
KERNELS = {
    "_scaled_dot_product_flash_attention_backward": 3,
    "jepa_loss": 2, "predictor_tokens_backward": 2, "vicreg": 3,
    "add_layer_norm_backward": 2, "bias_gelu_backward": 2,
}  # fmt: skip
#: Multi-tensor kernels (ATen/native/cuda/MultiTensorApply.cuh): lists, and tensors a launch takes.
_LISTS = {"_fused_adamw_": 36, "_foreach_norm": 110}
_CHUNK, _BLOCKS = 65536, 320


class Cost(NamedTuple):
    """Of one operator."""

    read: int
    written: int
    """Bytes."""
    flops: int
    """Of matrix products alone, as ``torch.utils.flop_counter`` counts them."""
    launches: int


def operator_cost(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Cost:
    """What a call of ``func`` costs; all zeros for a view.

    Args:
        out: what it returned.
    """
    name = func._schema.name.partition("::")[2]
    given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    changed = {
        a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    }
    if name == "_fused_adamw_":  # it writes the gradients only where it scales them
        changed.discard("grads")
    known = {_storage(t) for t in tensors(given)}
    fresh = [t for t in tensors(out) if _storage(t) not in known]
    changes = any(tensors(given.get(argument)) for argument in changed)
    if name in _FREE or not (fresh or changes):
        return Cost(0, 0, 0, 0)
    written = sum(map(size, fresh)) + sum(size(t) for a in changed for t in tensors(given.get(a)))
    read = 0
    for argument, value in given.items():
        if not (argument in changed and (name in _WRITE_ONLY or argument in _COPIES)):
            whole = sum(map(size, tensors(value)))
            read += min(whole, _as_many(value, fresh)) if _GATHERS.get(name) == argument else whole
    again, times = _passes(name, given)
    if name == "jepa_loss":
        read -= size(given["h"]) - min(size(given["h"]), _rows(given["target_idx"], given["h"]))
    if name == "jepa_loss_backward":  # in place where the factor is 1: nothing is touched
        read = written = 0
    return Cost(read + again, written, _flops(func, name, args, kwargs, given, out), times)


def size(tensor: Tensor) -> int:
    """Bytes of the memory that a tensor covers: what is expanded counts once."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n for n, step in steps if step or n == 0)


def _passes(name: str, given: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes read again, and launches, of operators that are more than one kernel."""
    if name == "native_layer_norm_backward":
        weight = any(given["output_mask"][1:])
        again = size(given["grad_out"]) + size(given["input"])  # in a kernel of its own
        return (again, 2) if weight else (0, 1)
    if name in _LISTS:
        first = tensors(next(iter(given.values())))
        chunks = sum(math.ceil(t.numel() / _CHUNK) for t in first)
        return 0, max(1, math.ceil(len(first) / _LISTS[name]), math.ceil(chunks / _BLOCKS))
    return 0, KERNELS.get(name, 1)


def _as_many(source: Tensor, written: Sequence[Tensor]) -> int:
    """Bytes of as many elements of ``source`` as were written."""
    return source.element_size() * sum(t.numel() for t in written)


def _rows(index: Tensor, source: Tensor) -> int:
    """Bytes of the rows that the M blocks of an image name, each once, as many as expected."""
    (_, blocks, each), n = index.shape, source.shape[1]
    named = n * (1 - (1 - min(each, n) / n) ** blocks)
    return round(len(source) * named) * source.shape[2] * source.element_size()


def _flops(
    func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any],
    given: Mapping[str, Any], out: Any,
) -> int:  # fmt: skip
    if name.startswith("vicreg"):
        u = given["u"]
        views, n, width = u.shape if u.dim() == 3 else (1, *u.shape)
        product = 2 * views * n * width * min(n, width)
        return int(product * (2 if name == "vicreg_backward" else 1))
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def tensors(value: Any) -> list[Tensor]:
    """Those in any nesting of lists and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
