"""The ops inside facebookresearch/ijepa-style code, without an edit of its source.

    integrations.accelerate(encoder)            # masking by gather_tokens
    integrations.accelerate(predictor)          # its input by predictor_tokens
    integrations.accelerate(src.train)          # LayerNorm, masks and smooth-L1 by jepa_loss
    integrations.restore(predictor)             # as if nothing had been

For one who may edit a line, ``prediction_loss`` is the loss without any replacing. The loop of the
target encoder's average stands in the script itself: ``njepa_kernels.nn.Ema`` or one call of
``ema_update_`` takes its place.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from .._runtime.dispatch import IMPLEMENTATIONS, Impl
from ..ops.jepa_loss.op import jepa_loss
from ._forwards import block_index, usable
from ._modules import accelerate_modules, restore_module
from ._report import Report
from ._script import accelerate_script, restore_script

__all__ = ["Report", "accelerate", "prediction_loss", "restore"]

Target = nn.Module | ModuleType | SimpleNamespace | dict[str, Any]


def _globals(who: str, target: object) -> dict[str, Any]:
    if isinstance(target, dict):
        return target
    if isinstance(target, ModuleType | SimpleNamespace):
        return vars(target)
    raise TypeError(
        f"{who}: expected an nn.Module, or a training script as a Python module, SimpleNamespace "
        f"or dict of globals, got {type(target).__name__}"
    )


def accelerate(module: Target, impl: Impl = "auto") -> Report:
    """Let published-style code run on the ops, with the results it had.

    For an ``nn.Module`` every submodule (so also inside DDP) is looked at:

    - a predictor (predictor_embed, mask_token [1, 1, d], predictor_pos_embed [1, N, d],
      predictor_blocks, predictor_norm, predictor_proj; called as (x, masks_x, masks)) assembles
      its input by ``predictor_tokens``;
    - an encoder (patch_embed, pos_embed [1, N, D], blocks, norm or None; perhaps
      interpolate_pos_encoding, which is called as before; called as (x, masks=None)) takes its
      patches by ``gather_tokens``.

    Masks are an int64 tensor [B, K] or a list of them, contexts too; rows come in the published
    order (mask after mask; targets outermost). A call the ops cannot serve (no masks, masks of
    several lengths or of another type or batch) goes to the class's forward. Before it is replaced,
    a forward is compared with ours on a small random example (two calls, which hooks see); a module
    that computes anything else, as one with noise or other attributes does, is left alone.

    For a training script (a Python module, a SimpleNamespace or ``globals()``) the globals that its
    closures look up are replaced: ``F`` (torch.nn.functional, or layer_norm itself),
    ``apply_masks``, ``repeat_interleave_batch``. LayerNorm of features that need no gradient is
    then put off until ``F.smooth_l1_loss`` (from anywhere), which becomes one ``jepa_loss``; asked
    for anything else, the deferred tensor is computed the published way. Inside ``torch.compile``
    nothing is deferred. The loss comes in the type it had; where that was bf16, sums are now fp32.

    The forward is set on the instance: state dict, parameters and class stay as they are, copies
    stay accelerated, and a pickle holds the class's forward. Accelerate before ``torch.compile``.
    A second call starts from the original, so only the last ``impl`` counts.

    Returns:
        Report: ``replaced`` (name -> what runs) and ``left`` (name -> why it was left alone).

    Raises:
        TypeError: ``module`` is none of the above.
        ValueError: nothing could be replaced (the message has the reasons), or an unknown ``impl``.
    """
    if impl not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"accelerate: impl must be one of {known}, got {impl!r}")
    if isinstance(module, nn.Module):
        report = accelerate_modules(module, impl)
    else:
        report = accelerate_script(_globals("accelerate", module), impl)
    if not report.replaced:
        raise ValueError(f"accelerate: nothing was replaced\n{report}")
    return report


def restore(module: Target) -> list[str]:
    """Undo ``accelerate`` exactly; returns the names of what had been replaced."""
    if isinstance(module, nn.Module):
        named = module.named_modules()
        return [name or "module" for name, part in named if restore_module(part)]
    return restore_script(_globals("restore", module))


def prediction_loss(
    z: torch.Tensor,
    h: torch.Tensor,
    masks_pred: torch.Tensor | list[torch.Tensor],
    n_contexts: int = 1,
    *,
    beta: float = 1.0,
    eps: float = 1e-5,
    impl: Impl = "auto",
) -> torch.Tensor:
    """The published loss in one op: smooth-L1 of z to LayerNorm(h) at the target masks.

    B batch, E context masks, M target masks, Kt targets each, N patches, D width. Takes the place
    of layer_norm, apply_masks, repeat_interleave_batch(..., repeat=E) and smooth_l1_loss
    (facebookresearch/ijepa, src/train.py).

    Args:
        z: [M*E*B, Kt, D], the predictor's output, row (m*E + e)*B + b.
        h: [B, N, D], the target encoder's output before its normalisation; a constant.
        masks_pred: M int64 tensors [B, Kt] of one shape, or one tensor.
        n_contexts: E, ``len(masks_enc)``.
        beta, eps, impl: see ``njepa_kernels.jepa_loss``.

    Returns:
        The mean over all elements: a scalar, fp32 (fp64 if an input is).

    Raises:
        TypeError, ValueError: wrong type or shape.
    """
    masks = masks_pred if isinstance(masks_pred, list) else [masks_pred]
    if not isinstance(h, torch.Tensor) or h.dim() != 3:
        got = list(h.shape) if isinstance(h, torch.Tensor) else type(h).__name__
        raise ValueError(f"prediction_loss: h must be a torch.Tensor [B,N,D], got {got}")
    if not usable(masks, len(h)):
        sizes = [
            f"{mask.dtype} {list(mask.shape)}"
            if isinstance(mask, torch.Tensor)
            else type(mask).__name__
            for mask in masks
        ]
        raise ValueError(
            f"prediction_loss: masks_pred must be int64 [{len(h)}, Kt] with one Kt, got {sizes}"
        )
    if n_contexts < 1:
        raise ValueError(f"prediction_loss: n_contexts must be at least 1, got {n_contexts}")
    target_idx = block_index(masks, n_contexts)
    return jepa_loss(z, h, target_idx, beta=beta, eps=eps, impl=impl).loss
