"""patchify in C++ (csrc/cpu/patchify.*). Indices in range."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..._runtime.native import ops


def forward(
    images: torch.Tensor,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    idx: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """x * scale + shift of each patch, [B, K, 3 p p]; layouts it does not know are copied."""
    pixels, (column, channel) = images, images.stride()[2:]
    if column != 1 and (column, channel) != (3, 1):
        # Not contiguous(): it keeps odd strides of sides without or with one element.
        pixels = images.clone(memory_format=torch.contiguous_format)
    batch, height, width, _ = images.shape
    kept = (height // patch_size) * (width // patch_size) if idx is None else idx.shape[1]
    out = images.new_empty(batch, kept, 3 * patch_size * patch_size, dtype=out_dtype)
    ops().patchify(pixels, patch_size, torch.tensor([scale, shift]), idx, out)
    return out
