"""The specification of patchify in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..._runtime.rows import gather_rows


def patchify_reference(
    images: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    idx: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(x / 255 - mean) / std of the pixels of each patch, channel by channel, in ``out_dtype``."""
    batch, height, width, _ = images.shape
    p, grid = patch_size, (height // patch_size, width // patch_size)
    # [B, rows, p, columns, p, 3] -> [B, rows, columns, 3, p, p]
    pixels = images.view(batch, grid[0], p, grid[1], p, 3).permute(0, 1, 3, 5, 2, 4)
    patches = pixels.reshape(batch, grid[0] * grid[1], 3 * p * p)
    if idx is not None:
        patches = gather_rows(patches, idx)
    dtype = torch.promote_types(out_dtype, torch.float32)
    x = patches.unflatten(2, (3, p * p)).to(dtype).div_(255)
    for c in range(3):
        x[:, :, c].sub_(mean[c]).div_(std[c])
    out: torch.Tensor = x.flatten(2).to(out_dtype)
    return out
