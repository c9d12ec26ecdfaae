"""The frozen 2-D sin-cos position tables."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos(values: Tensor, width: int) -> Tensor:
    """[..., width] features of [...] numbers, in their type: [sin(v w_i) | cos(v w_i)].

    w_i = 10000^(-i / (width/2)), i < width/2; ``width`` is even.
    """
    if width % 2:
        raise ValueError(f"sincos needs an even width, got {width}")
    half = width // 2
    powers = torch.arange(half, dtype=values.dtype, device=values.device) / half
    angles = values.unsqueeze(-1) * 10000.0**-powers
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def position_table(width: int, grid: tuple[int, int], scale: float = 1.0) -> Tensor:
    """2-D sin-cos table [H*W, width], fp32, of a grid of H rows and W columns, row-major.

    The first half of the channels encodes the column, the second the row, both as integers. Every
    row has an RMS of ``scale``/sqrt(2). Source: facebookresearch/ijepa, src/models/
    vision_transformer.py (``get_2d_sincos_pos_embed``), where scale is 1.
    """
    if width % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width that is a multiple of 4, got {width}")
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    table = torch.cat(
        (sincos(column.flatten(), width // 2), sincos(row.flatten(), width // 2)), dim=-1
    )
    return (table * scale).float()
