"""adamw_ema_: AdamW, the average that follows the weights and bf16 copies of both, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._runtime.checks import FLOATS, can_read_values, check_like, check_tensor
from ..._runtime.dispatch import Impl, backend, choose
from ..._runtime.library import refuse_vmap, register
from .reference import Number, adamw_ema_reference_

_OP = "adamw_ema_"
_FLAGS = (*FLOATS, torch.bool)


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    targets: list[Tensor],
    params_bf16: list[Tensor],
    targets_bf16: list[Tensor],
    lr: Tensor,
    betas: list[float],
    eps: float,
    weight_decay: Tensor,
    momentum: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
    impl: str,
) -> None:
    # The kernels take dense memory; a tensor with gaps goes through a copy and back.
    written = (params, exp_avgs, exp_avg_sqs, targets, params_bf16, targets_bf16)
    dense = [[tensor.contiguous() for tensor in tensors] for tensors in written]
    gradients = [grad.contiguous() for grad in grads]
    backend(_OP, impl, params[0]).update(
        dense[0], gradients, dense[1], dense[2], steps, *dense[3:],
        lr, betas, eps, weight_decay, momentum, scale, found_inf,
    )  # fmt: skip
    for tensors, copies in zip(written, dense, strict=True):
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def _update_fake(*args: object) -> None:
    return None


_update_op = register(
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] targets,"
    " Tensor(f!)[] params_bf16, Tensor(g!)[] targets_bf16, Tensor lr, float[] betas, float eps,"
    " Tensor weight_decay, Tensor momentum, Tensor? scale, Tensor? found_inf, str impl) -> ()",
    _update,
    _update_fake,
)


def _check_number(name: str, value: Number, high: float) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise TypeError(
                f"{_OP}: {name} must be a float or a 0-dim floating tensor, "
                f"got {value.dtype} of shape {list(value.shape)}"
            )
        if not can_read_values(value):
            return
    if not 0.0 <= value <= high:
        raise ValueError(f"{_OP}: {name} must be in [0, {high:g}], got {float(value)}")


def _check_lists(params: Sequence[Tensor], lists: dict[str, Sequence[Tensor] | None]) -> None:
    """Number, type, shape and device. What fits passes one expression, as in ``ema_update_``."""
    kinds = {"grads": FLOATS, "params_bf16": (torch.bfloat16,), "targets_bf16": (torch.bfloat16,)}
    for name, tensors in lists.items():
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise ValueError(
                f"{_OP}: {name} must have {len(params)} tensors, as params has, got {len(tensors)}"
            )
        dtypes = kinds.get(name, (torch.float32,))
        for i, (tensor, like) in enumerate(zip(tensors, params, strict=True)):
            fits = isinstance(tensor, Tensor) and tensor.dtype in dtypes
            if fits and tensor is not like:
                shape = () if name == "steps" else like.shape
                fits = tensor.shape == shape and tensor.device == like.device
            if fits:
                continue
            if name == "steps":
                check_tensor(_OP, f"steps[{i}]", tensor, "[]", (), dtypes=dtypes)
            check_like(_OP, f"{name}[{i}]", tensor, dtypes, like)


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Number,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Number = 0.0,
    targets: Sequence[Tensor] | None = None,
    momentum: Number = 1.0,
    params_bf16: Sequence[Tensor] | None = None,
    targets_bf16: Sequence[Tensor] | None = None,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """AdamW on every parameter, the average of what it gives, and bf16 copies, in place.

        t <- t + 1,                        g = scale grad
        e <- e + (1 - b1) (g - e),         v <- b2 v + (1 - b2) g^2
        p <- (1 - lr wd) p - lr / (1 - b1^t) e / (sqrt(v) / sqrt(1 - b2^t) + eps)
        target <- m target + (1 - m) p;    bf16 copies <- p, target

    All in fp32, with the factors rounded from fp64. That is ``torch.optim.AdamW(fused=True)``
    (Loshchilov & Hutter, arXiv 1711.05101) followed by ``ema_update_``: on a CPU with AVX2 or
    AVX512 C++ gives their bits, but for the last ``numel % 16`` values of a tensor, which torch
    computes partly in fp64. Each tensor is read and written once. Runs without autograd, reads
    nothing on the host but of tensors on the CPU, and writes nothing if an argument is refused.

    Args:
        params, exp_avgs, exp_avg_sqs: fp32; the moments e and v.
        grads: of any floating type, read only.
        steps: t, fp32, 0-dim, each a tensor of its own on the device of its parameter.
        lr, weight_decay: floats, or 0-dim floating tensors (on a CPU, or the device of ``params``).
        targets: fp32, or None: no average.
        momentum: m in [0, 1], as lr. 1 - m is taken in a tensor's own type: use fp64.
        params_bf16, targets_bf16: bf16 copies that are written too, or None.
        scale: 0-dim factor of the gradients, such as that of clipping; it is not written to them.
        found_inf: 0-dim, bool or floating: where it is not 0 nothing changes, steps included.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Raises:
        TypeError, ValueError: wrong type, shape, device, number of tensors, or a number out of
            range.
    """
    refuse_vmap(_OP, *params, *grads)
    _check_lists(
        params,
        {
            "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs,
            "steps": steps, "targets": targets, "params_bf16": params_bf16,
            "targets_bf16": targets_bf16,
        },
    )  # fmt: skip
    if targets_bf16 is not None and targets is None:
        raise ValueError(f"{_OP}: targets_bf16 are copies of targets, which are None")
    for name, value, high in (
        ("lr", lr, float("inf")), ("weight_decay", weight_decay, float("inf")),
        ("eps", eps, float("inf")), ("momentum", momentum, 1.0),
    ):  # fmt: skip
        _check_number(name, value, high)
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{_OP}: betas must be in [0, 1), got {betas}")
    for name, flag in (("scale", scale), ("found_inf", found_inf)):
        if flag is not None:
            check_tensor(_OP, name, flag, "[]", (), dtypes=_FLAGS)
    name = choose(_OP, impl, params[0].device if params else torch.device("cpu"), *grads)
    if name == "reference" or not params:
        adamw_ema_reference_(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, targets=targets, momentum=momentum,
            params_bf16=params_bf16, targets_bf16=targets_bf16, scale=scale, found_inf=found_inf,
        )  # fmt: skip
        return
    numbers = [
        x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
        for x in (lr, weight_decay, momentum)
    ]
    written = [
        list(tensors or ())
        for tensors in (params, exp_avgs, exp_avg_sqs, steps, targets, params_bf16, targets_bf16)
    ]
    with torch.no_grad():
        _update_op(
            written[0], list(grads), *written[1:], numbers[0], list(betas), eps, *numbers[1:],
            scale, found_inf, name,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([t for tensors in written for t in tensors])
