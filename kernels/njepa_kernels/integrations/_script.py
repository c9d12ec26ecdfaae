"""A published-style training script: the globals its closures call, replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from .._runtime.dispatch import Impl
from ._deferred import DeferredTargets, layer_norm_later
from ._report import Report

Function = Callable[..., Any]
_ORIGINAL = "_njepa_kernels_original"


def _layer_norm(impl: Impl) -> Function:
    @functools.wraps(F.layer_norm)
    def layer_norm(
        input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Any:
        later = layer_norm_later(input, normalized_shape, weight, bias, eps, impl)
        return F.layer_norm(input, normalized_shape, weight, bias, eps) if later is None else later

    return layer_norm


def _functional(impl: Impl) -> ModuleType:
    """torch.nn.functional with another layer_norm."""
    copy = ModuleType(F.__name__, F.__doc__)
    copy.__dict__.update(vars(F))
    copy.layer_norm = _layer_norm(impl)  # type: ignore[attr-defined]
    return copy


def _apply_masks(original: Function) -> Function:
    @functools.wraps(original)
    def apply_masks(x: Any, masks: Any, *args: Any, **kwargs: Any) -> Any:
        if type(x) is DeferredTargets and not args and not kwargs:
            return x.gather_masks(masks, original)
        return original(x, masks, *args, **kwargs)

    return apply_masks


def _repeat_interleave_batch(original: Function) -> Function:
    # The parameters have the published names, for callers that use them.
    @functools.wraps(original)
    def repeat_interleave_batch(x: Any, B: int, repeat: int) -> Any:
        if type(x) is DeferredTargets:
            return x.repeat_blocks(B, repeat, original)
        return original(x, B, repeat)

    return repeat_interleave_batch


def _gathers(apply_masks: Function) -> bool:
    """Whether it takes the rows of each mask and puts the masks one after the other."""
    x = torch.arange(12.0).view(2, 3, 2)
    masks = [torch.tensor([[0, 2], [1, 2]]), torch.tensor([[1, 0], [2, 2]])]
    want = [[x[b, i].tolist() for i in mask[b]] for mask in masks for b in range(2)]
    got: torch.Tensor = apply_masks(x, masks)
    return isinstance(got, torch.Tensor) and got.tolist() == want


def _repeats(repeat_interleave_batch: Function) -> bool:
    """Whether each group of B rows is repeated as a whole."""
    got: torch.Tensor = repeat_interleave_batch(torch.arange(4.0).view(4, 1), 2, repeat=2)
    return isinstance(got, torch.Tensor) and got.flatten().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def _refusal(check: Callable[[Function], bool], function: object) -> str | None:
    if not callable(function):
        return f"it is no function but {type(function).__name__}"
    try:
        return None if check(function) else "it does something else than the published function"
    # Whatever a foreign function raises is the reason that is reported.
    except Exception as error:
        text = str(error).partition("\n")[0]
        return f"it could not be checked on an example: {type(error).__name__}: {text}"


def accelerate_script(names: dict[str, Any], impl: Impl) -> Report:
    """Replace in ``names``, the globals of a script, what computes the targets; all or nothing."""
    restore_script(names)
    report = Report()
    new: dict[str, Any] = {}
    for name, value in names.items():
        if value is F:
            new[name] = _functional(impl)
            report.replaced[name] = "torch.nn.functional, its layer_norm deferred"
        elif value is F.layer_norm:
            new[name] = _layer_norm(impl)
            report.replaced[name] = "layer_norm, deferred"
    if not new:
        report.left["F"] = "no global is torch.nn.functional or its layer_norm"
    for name, check, wrap in (
        ("apply_masks", _gathers, _apply_masks),
        ("repeat_interleave_batch", _repeats, _repeat_interleave_batch),
    ):
        if name not in names:
            report.left[name] = "there is no global of this name"
            continue
        reason = _refusal(check, names[name])
        if reason is not None:
            report.left[name] = reason
        else:
            new[name] = wrap(names[name])
            report.replaced[name] = f"deferred up to jepa_loss (impl={impl!r})"
    # Without both there is nothing to defer, or nothing that ends in the loss.
    if "apply_masks" not in new or "F" in report.left:
        for name in report.replaced:
            report.left[name] = "of no use without the others"
        return Report({}, report.left)
    for name, value in new.items():
        setattr(value, _ORIGINAL, names[name])
        names[name] = value
    return report


def restore_script(names: dict[str, Any]) -> list[str]:
    """Put the originals back; the names that had been replaced."""
    changed = [name for name, value in names.items() if _ORIGINAL in getattr(value, "__dict__", {})]
    for name in changed:
        names[name] = names[name].__dict__[_ORIGINAL]
    return changed
