"""ema_update_: the exponential moving average of many tensors, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..._runtime.checks import FLOATS, can_read_values, check_like
from ..._runtime.dispatch import Impl, backend, choose
from ..._runtime.library import refuse_vmap, register
from .reference import ema_update_reference_

_OP = "ema_update_"


def host_rates(
    momentum: float | torch.Tensor, device: torch.device
) -> tuple[float | torch.Tensor, float]:
    """m and 1 - m as numbers; a momentum on an accelerator as it is (and 0).

    Reading that would make the host wait; only what runs on a CPU does. 1 - m in the type of m: a
    tensor's own, fp64 for a float.
    """
    if (
        isinstance(momentum, torch.Tensor)
        and momentum.device.type != "cpu"
        and device.type != "cpu"
    ):
        return momentum, 0.0
    return float(momentum), float(1.0 - momentum)


def _update(
    targets: list[torch.Tensor],
    sources: list[torch.Tensor],
    momentum: float,
    momentum_tensor: torch.Tensor | None,
    shadow: list[torch.Tensor] | None,
    impl: str,
) -> None:
    if not targets:
        return
    written = [*targets, *(shadow or [])]
    # The kernels take dense memory; a tensor with gaps goes through a copy and back.
    dense = [tensor.contiguous() for tensor in written]
    count = len(targets)
    backend(_OP, impl, targets[0]).update(
        dense[:count],
        [source.contiguous() for source in sources],
        *host_rates(momentum if momentum_tensor is None else momentum_tensor, targets[0].device),
        None if shadow is None else dense[count:],
    )
    for tensor, copy in zip(written, dense, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)


def _update_fake(
    targets: list[torch.Tensor],
    sources: list[torch.Tensor],
    momentum: float,
    momentum_tensor: torch.Tensor | None,
    shadow: list[torch.Tensor] | None,
    impl: str,
) -> None:
    return None


_update_op = register(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, Tensor? momentum_tensor,"
    " Tensor(b!)[]? shadow, str impl) -> ()",
    _update,
    _update_fake,
)


def _check_tensors(
    op: str,
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """Type, dtype, shape and device of every tensor.

    Nothing is remembered from step to step: the data of a parameter may change (ZeRO exchanges it).
    What fits passes one expression; only the rest comes to the check that words a message.
    """
    lists = (
        ("targets", targets, (torch.float32,)),
        ("sources", sources, FLOATS),
        ("shadow", shadow or (), (torch.bfloat16,)),
    )
    for name, tensors, dtypes in lists:
        for i, (tensor, like) in enumerate(zip(tensors, targets, strict=False)):
            fits = isinstance(tensor, torch.Tensor) and tensor.dtype in dtypes
            if fits and tensor is not like:
                fits = tensor.shape == like.shape and tensor.device == like.device
            if not fits:
                if not isinstance(like, torch.Tensor):
                    raise TypeError(f"{op}: targets[{i}] must be a torch.Tensor, got {like!r:.80}")
                check_like(op, f"{name}[{i}]", tensor, dtypes, like)


def _check_momentum(op: str, momentum: float | torch.Tensor) -> None:
    if isinstance(momentum, torch.Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise TypeError(
                f"{op}: momentum must be a float or a 0-dim floating tensor, "
                f"got {momentum.dtype} of shape {list(momentum.shape)}"
            )
        if not can_read_values(momentum):
            return
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"{op}: momentum must be in [0, 1], got {float(momentum)}")


def ema_update_(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    shadow: Sequence[torch.Tensor] | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """t <- m t + (1 - m) s for every pair of tensors, in fp32, in place; then shadow <- t.

    The target encoder's update of I-JEPA (facebookresearch/ijepa, src/train.py). Runs without
    autograd. Nothing is written if an argument is refused.

    Args:
        targets: fp32 tensors.
        sources: tensors of any floating type, with the shapes and devices of ``targets``.
        momentum: m in [0, 1], a float, or a 0-dim floating tensor (its value is not checked on an
            accelerator). 1 - m is taken in the tensor's own type: near m = 1 use fp64, because an
            fp32 m = 0.99999 is off by 0.14 % in 1 - m.
        shadow: bf16 tensors of the same shapes that receive the rounded result, or None.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Raises:
        TypeError, ValueError: wrong type, shape, device, number of tensors, or momentum.
    """
    op = _OP
    refuse_vmap(op, *targets, *sources)
    for name, tensors in (("sources", sources), ("shadow", shadow)):
        if tensors is not None and len(tensors) != len(targets):
            raise ValueError(
                f"{op}: {name} must have {len(targets)} tensors, as targets has, got {len(tensors)}"
            )
    _check_tensors(op, targets, sources, shadow)
    _check_momentum(op, momentum)
    name = choose(op, impl, targets[0].device if targets else torch.device("cpu"), *sources)
    if name == "reference" or not targets:
        ema_update_reference_(targets, sources, momentum, shadow)
        return
    tensor = momentum if isinstance(momentum, torch.Tensor) else None
    value = 0.0 if isinstance(momentum, torch.Tensor) else float(momentum)
    with torch.no_grad():
        _update_op(
            list(targets),
            list(sources),
            value,
            tensor,
            None if shadow is None else list(shadow),
            name,
        )
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([*targets, *(shadow or [])])
