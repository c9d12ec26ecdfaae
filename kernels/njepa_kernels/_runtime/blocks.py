"""Block sizes of the Triton kernels: pure functions of (width, type, architecture).

What ``njepa_kernels.tools.tune`` found on a device replaces them, once its file is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

#: For the kernels that sum rows by index: left to itself ptxas aims at 48 and spills 8 bytes.
SCATTER_REGISTERS = 128
#: Up to this width a row that is normalised or summed is held in registers as a whole.
MAX_WIDTH = 2048


@dataclass(frozen=True)
class Tile:
    """ROWS x BLOCK_D elements per program, and the warps that share them."""

    rows: int
    block_d: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def copy_tile(width: int, dtype: torch.dtype, program_bytes: int = 8192) -> Tile:
    """Rows that are moved, not reduced: columns are cut so that no lane is idle at ViT widths.

    With 8 KB per program and 4 warps every thread has four 16-byte accesses in flight.
    """
    divisor = width & -width
    block_d = divisor if divisor >= 64 else next_power_of_2(width)
    block_d = max(16, min(block_d, 512))
    return Tile(max(1, program_bytes // dtype.itemsize // block_d), block_d, 4)


def elementwise_tile(width: int) -> Tile:
    """Elements that are computed with, not only moved: 8 per thread, or registers run short.

    The columns as in ``copy_tile``, at most 256.
    """
    divisor = width & -width
    block_d = divisor if divisor >= 64 else next_power_of_2(width)
    block_d = max(16, min(block_d, 256))
    return Tile(1024 // block_d, block_d, 4)


def row_tile(width: int) -> Tile:
    """Whole rows in registers: about 16 fp32 values per thread and array.

    Wider rows are cut into column tiles, half as wide so that the last one is not mostly empty.
    """
    block_d = max(16, next_power_of_2(width)) if width <= MAX_WIDTH else MAX_WIDTH // 2
    rows = max(1, 1024 // block_d)
    return Tile(rows, block_d, 8 if block_d == 2048 else 4)


def norm_tile(width: int) -> Tile:
    """Whole rows in registers, however wide: 8 values per thread and array, 16 from 8192 on.

    Beyond that ptxas spills.
    """
    block_d = max(16, next_power_of_2(width))
    rows = max(1, 1024 // block_d)
    return Tile(rows, block_d, min(max(rows * block_d // 256, 4), 16))


def scatter_tile(width: int) -> Tile:
    """Rows that collect the gradients of the tokens pointing to them; 32 fp32 sums per thread.

    Whole rows up to ``MAX_WIDTH``: the search for those tokens is repeated for each column tile.
    """
    block_d = max(16, min(next_power_of_2(width), MAX_WIDTH))
    return Tile(4096 // block_d, block_d, 4)


def index_block(k: int) -> int:
    """How many indices are compared at once, with each row of a ``scatter_tile``."""
    return max(16, min(next_power_of_2(k), 64))


@dataclass(frozen=True)
class ProductTile:
    """A block x block tile of a Gram matrix, reduced over ``block_k`` at a time."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None


def product_tile(side: int, arch: int) -> ProductTile:
    """``side``: of the square result, ``arch``: 80, 90, 100.

    Small results get small tiles, or most multiprocessors would have nothing to do.
    """
    block = 32 if side <= 512 else 64
    # From sm_90 on ptxas may aim at 128 registers and spill 8 bytes (sm_100, and with Triton 3.9
    # sm_90 too); for sm_80 it finds its way alone.
    return ProductTile(block, 32, 4, 2 if arch < 90 else 3, 208 if arch >= 90 else None)


_TileType = TypeVar("_TileType", Tile, ProductTile)

#: Tiles by the name of the place that asks, from ``tune.load_tiles``.
tuned_tiles: dict[str, Tile | ProductTile] = {}
#: Where ``tune`` collects which places ask, and what the functions above answer.
asked_tiles: dict[str, Tile | ProductTile] | None = None


def tuned(place: str, default: _TileType, width: int, *more: object) -> _TileType:
    """The tile found by tuning for ``place`` at this width (and so on), else ``default``."""
    if not tuned_tiles and asked_tiles is None:
        return default
    name = " ".join((place, str(width), *(str(size).removeprefix("torch.") for size in more)))
    if asked_tiles is not None:
        asked_tiles.setdefault(name, default)
    tile = tuned_tiles.get(name, default)
    if not isinstance(tile, type(default)):
        raise ValueError(f"tuned tile of {name!r}: expected one like {default}, got {tile}")
    return tile
