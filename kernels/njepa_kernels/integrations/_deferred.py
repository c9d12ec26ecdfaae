"""Targets that are not computed until it is known what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from .._runtime.dispatch import Impl
from ..ops.jepa_loss.op import jepa_loss
from ._forwards import block_index, layer_norm_dtype, published_dtype, usable

Compute = Callable[[], torch.Tensor]

_T = torch.Tensor
#: What may be asked of a deferred tensor without computing it.
_METADATA = {
    getattr(_T, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "requires_grad",
        "is_cuda",
        "layout",
        "is_meta",
    )
} | {_T.size, _T.dim, _T.numel, _T.__len__, _T.is_floating_point, _T.get_device}


class DeferredTargets(torch.Tensor):
    """LayerNorm(h), or rows of it, as a tensor without storage.

    ``F.smooth_l1_loss(pred, targets)`` becomes one ``jepa_loss``. Shape, type and device can be
    read; anything else computes the tensor first, with the functions the script itself has and
    under the autocast of that moment, and continues with the result, which is kept.
    """

    _h: torch.Tensor
    _masks: list[torch.Tensor] | None
    _repeat: int
    _eps: float
    _impl: Impl
    _compute: Compute
    _value: torch.Tensor | None
    _versions: tuple[int, ...]
    _autocast: tuple[bool, torch.dtype]

    @staticmethod
    def __new__(
        cls,
        h: torch.Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        compute: Compute,
        *,
        masks: list[torch.Tensor] | None = None,
        repeat: int = 1,
        eps: float,
        impl: Impl,
    ) -> DeferredTargets:
        self: DeferredTargets = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=h.device, requires_grad=False
        )
        self._h, self._masks, self._repeat = h, masks, repeat
        self._eps, self._impl = eps, impl
        self._value = None
        # No closure over self: a cycle would keep the features until the garbage is collected.
        self._compute = compute
        self._versions = self._seen()
        device = h.device.type
        self._autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return self

    def _seen(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in (self._h, *(self._masks or ())))

    def check_unchanged(self) -> None:
        if self._seen() != self._versions:
            raise RuntimeError(
                "accelerate: features or masks were changed in place after F.layer_norm or "
                "apply_masks and before the loss. Change them before, or restore() the script."
            )

    def computed(self) -> torch.Tensor:
        """The tensor the published code has here, computed again."""
        self.check_unchanged()
        enabled, dtype = self._autocast
        with torch.no_grad(), torch.autocast(self._h.device.type, dtype, enabled=enabled):
            return self._compute()

    def materialise(self) -> torch.Tensor:
        """The same, computed once: what is written into it stays."""
        if self._value is None:
            self._value = self.computed()
        return self._value

    def gather_masks(self, masks: Any, apply_masks: Callable[..., torch.Tensor]) -> torch.Tensor:
        """``apply_masks(self, masks)``, deferred where that is possible."""
        plain = self._value is not None or self._masks is not None
        if plain or not usable(masks, len(self._h)) or any(m.is_inference() for m in masks):
            return apply_masks(self.materialise(), masks)
        batch, _, width = self._h.shape
        masks = list(masks)
        shape = (len(masks) * batch, masks[0].shape[1], width)
        return DeferredTargets(
            self._h,
            shape,
            self.dtype,
            lambda: apply_masks(self.computed(), masks),
            masks=masks,
            eps=self._eps,
            impl=self._impl,
        )

    def repeat_blocks(
        self, batch: int, repeat: int, repeat_interleave_batch: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """``repeat_interleave_batch(self, batch, repeat)``, deferred where that is possible."""
        plain = self._masks is None or self._repeat != 1 or self._value is not None
        if plain or batch != len(self._h) or repeat < 1:
            return repeat_interleave_batch(self.materialise(), batch, repeat)
        return DeferredTargets(
            self._h,
            (repeat * self.shape[0], *self.shape[1:]),
            self.dtype,
            lambda: repeat_interleave_batch(self.computed(), batch, repeat),
            masks=self._masks,
            repeat=repeat,
            eps=self._eps,
            impl=self._impl,
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.smooth_l1_loss:
            loss = _fused_loss(*args, **kwargs)
            if loss is not None:
                return loss
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What reaches the dispatcher without passing __torch_function__: calls from C++.
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def _plain(value: Any) -> Any:
    return value.materialise() if isinstance(value, DeferredTargets) else value


def _fused_loss(
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
    **others: Any,
) -> torch.Tensor | None:
    """``F.smooth_l1_loss`` to deferred targets in one op; None: this call is another one."""
    if type(target) is not DeferredTargets or type(input) is not torch.Tensor or others:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(input):
        return None
    if target._masks is None or target._value is not None:
        return None
    if (size_average, reduce, reduction) != (None, None, "mean") or not beta >= 0:
        return None
    if not input.is_floating_point() or input.shape != target.shape:
        return None
    target.check_unchanged()
    target_idx = block_index(target._masks, target._repeat)
    loss = jepa_loss(
        input, target._h, target_idx, beta=beta, eps=target._eps, impl=target._impl
    ).loss
    return loss.to(published_dtype(input, target.dtype))


def layer_norm_later(
    h: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float, impl: Impl
) -> DeferredTargets | None:
    """LayerNorm(h) deferred, or None where ``h`` is no constant [B, N, D] of features."""
    if torch.compiler.is_compiling() or type(h) is not torch.Tensor or h.dim() != 3:
        return None
    if (h.requires_grad and torch.is_grad_enabled()) or not h.is_floating_point():
        return None
    if h.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(h):
        return None
    if weight is not None or bias is not None or tuple(normalized_shape) != h.shape[2:]:
        return None
    shape = tuple(normalized_shape)
    return DeferredTargets(
        h,
        tuple(h.shape),
        layer_norm_dtype(h),
        lambda: F.layer_norm(h, shape, eps=eps),
        eps=eps,
        impl=impl,
    )
