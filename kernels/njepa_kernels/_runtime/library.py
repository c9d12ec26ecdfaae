"""Registration of the fused ops with PyTorch's dispatcher, as torch.ops.<NAMESPACE>.*."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

#: Every operator of the package lives here; a vendored copy needs another name.
NAMESPACE = "njepa"

_MUTATION = re.compile(r"Tensor\(\w+!\)")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

Operator = Callable[..., Any]

#: What each operator runs on a device, for ``njepa_kernels.tools.resources``.
kernels: dict[Operator, Callable[..., Any]] = {}


def _refuse_vmap(name: str) -> Callable[..., Any]:
    def rule(*args: object, **kwargs: object) -> None:
        raise RuntimeError(vmap_message(name))

    return rule


def vmap_message(op: str) -> str:
    return (
        f"{op}: torch.vmap is not supported: the op is batched already. Give it the batch "
        "dimension, or loop over the calls."
    )


def refuse_vmap(op: str, *tensors: object) -> None:
    """Raise if a tensor is inside ``torch.vmap``, before a check trips over its hidden dimension.

    While compiling the dispatcher's own rule (``register``) says the same.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and torch._C._functorch.is_batchedtensor(tensor):
            raise RuntimeError(vmap_message(op))


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Operator:
    """Define ``NAMESPACE::schema``: one kernel for CPU and CUDA, a fake one, autograd, no vmap.

    ``Library.impl`` instead of ``custom_op``: less to do per call. Without ``backward`` the op is
    not differentiable and says so in the backward; an op that writes into its arguments passes
    autograd by.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_vmap(qualified, _refuse_vmap(name), lib=_library)
    operator: Operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    kernels[operator] = kernel
    if _MUTATION.search(schema):
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        return operator
    torch.library.register_autograd(
        qualified,
        backward or _not_differentiable(name),
        setup_context=setup_context,
        lib=_library,
    )
    return operator


def _listened() -> bool:
    """Whether a mode or a function transform wants to see operators."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def may_reuse_saved() -> bool:
    """Whether the backward that runs may write into the tensors that its forward saved.

    So it is where the engine frees the graph behind this node (no retain_graph), nothing records
    the backward for another one (no create_graph), and nothing else sees operators: then no later
    backward can reach what was saved. Where PyTorch cannot say whether it keeps the graph, no.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _listened():
        return False
    # AOTAutograd asks the same before it reuses memory that a forward donated.
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def _not_differentiable(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: object) -> None:
        raise NotImplementedError(
            f"{name}: has no derivative (second derivatives: use impl='reference')"
        )

    return backward
