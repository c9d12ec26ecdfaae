"""The forwards of published-style modules with the ops in them.

B batch, E context masks, M target masks, Kc and Kt tokens each, N patches, D and d widths. Masks
are lists of int64 [B, K]; rows of several masks follow one another along the batch
(facebookresearch/ijepa, src/masks/utils.py and src/models/vision_transformer.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .._runtime.dispatch import Impl
from ..ops.gather_tokens.op import gather_tokens
from ..ops.predictor_tokens.op import predictor_tokens

Masks = torch.Tensor | list[torch.Tensor]


def as_list(masks: Masks) -> list[torch.Tensor]:
    return masks if isinstance(masks, list) else [masks]


def usable(masks: object, batch: int) -> bool:
    """Whether ``masks`` is a list of int64 tensors, all [batch, K] with one K."""
    if not isinstance(masks, list) or not masks:
        return False
    for mask in masks:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.int64:
            return False
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape != masks[0].shape:
            return False
    return True


def block_index(masks: list[torch.Tensor], n_contexts: int = 1) -> torch.Tensor:
    """M masks [B, K] -> [B, M * n_contexts, K], each mask ``n_contexts`` times in a row."""
    stacked = torch.stack(masks, dim=1)
    return stacked if n_contexts == 1 else stacked.repeat_interleave(n_contexts, dim=1)


def encode(module: Any, x: torch.Tensor, masks: list[torch.Tensor] | None, impl: Impl) -> Any:
    """Images [B, C, H, W] -> [E*B, Kc, D], row e*B + b; without masks [B, N, D]."""
    x = module.patch_embed(x)
    pos = module.pos_embed
    if hasattr(module, "interpolate_pos_encoding"):
        pos = module.interpolate_pos_encoding(x, pos)
    if masks is None:
        x = x + pos
    else:
        # x + pos in the module's own type, which under autocast is wider than that of x.
        x = x.to(torch.promote_types(x.dtype, pos.dtype))
        if len(masks) == 1:
            x = gather_tokens(x, masks[0], pos[0], impl=impl)
        else:
            x = gather_tokens(x, torch.stack(masks, dim=1), pos[0], impl=impl)
            x = x.transpose(0, 1).flatten(0, 1)
    for block in module.blocks:
        x = block(x)
    return x if module.norm is None else module.norm(x)


def predict(
    module: Any, x: torch.Tensor, masks_x: list[torch.Tensor], masks: list[torch.Tensor], impl: Impl
) -> Any:
    """Context tokens [E*B, Kc, D] -> predictions [M*E*B, Kt, D], row (m*E + e)*B + b."""
    x = module.predictor_embed(x)
    pos, mask_token = module.predictor_pos_embed, module.mask_token
    # The type in which torch.cat joins context and queries; under autocast that of the queries.
    dtype = torch.promote_types(torch.promote_types(x.dtype, pos.dtype), mask_token.dtype)
    n_context = x.shape[1]
    target_idx = torch.stack(masks, dim=1).repeat(len(masks_x), 1, 1)
    context_idx = torch.cat(masks_x)
    x = predictor_tokens(
        x.to(dtype), pos[0], mask_token.flatten(), context_idx, target_idx, impl=impl
    )
    for block in module.predictor_blocks:
        x = block(x)
    x = module.predictor_norm(x)
    return module.predictor_proj(x[:, n_context:])


def published_dtype(pred: torch.Tensor, target_dtype: torch.dtype) -> torch.dtype:
    """The type ``F.smooth_l1_loss`` returns, autocast included."""
    if torch.is_autocast_enabled(pred.device.type):
        return torch.promote_types(torch.float32, torch.promote_types(pred.dtype, target_dtype))
    return torch.promote_types(pred.dtype, target_dtype)


def layer_norm_dtype(h: torch.Tensor) -> torch.dtype:
    """The type ``F.layer_norm(h)`` returns, autocast included (it differs between devices)."""
    return F.layer_norm(h.new_empty(0, 1), (1,)).dtype
