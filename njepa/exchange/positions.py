"""A position table for another number of patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from njepa.models.positions import position_table, sincos


def resize_positions(table: Tensor, side: int) -> Tensor:
    """[1, n², D] of n x n patches as [1, side², D], over all of them: there is no class token.

    A patch gets the code of the place in the image where its middle lies, old coordinate
    (i + .5) n/side - .5, so codes stay within what the blocks have seen. (A new sin-cos table of
    side x side would give the old codes to other places, and codes never seen to the rest.)
    A sin-cos table is computed at these coordinates exactly; any other is interpolated there,
    bicubic with antialiasing. Our reading: facebookresearch/ijepa's ``interpolate_pos_encoding``
    keeps the first position apart, as if it were a class token.
    """
    old, width = round(table.shape[1] ** 0.5), table.shape[2]
    if old == side:
        return table
    scale = table[0, 0].max().item()  # cos(0) times the scale, if it is sin-cos
    if width % 4 == 0 and torch.allclose(
        table[0], position_table(width, (old, old), scale), rtol=0, atol=1e-5 * abs(scale)
    ):
        at = (torch.arange(side, dtype=torch.float64) + 0.5) * old / side - 0.5
        row, column = torch.meshgrid(at, at, indexing="ij")
        codes = (sincos(column.flatten(), width // 2), sincos(row.flatten(), width // 2))
        return (scale * torch.cat(codes, dim=-1)).to(table.dtype).unsqueeze(0)
    image = table.reshape(1, old, old, width).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True)
    return image.permute(0, 2, 3, 1).reshape(1, side * side, width)
