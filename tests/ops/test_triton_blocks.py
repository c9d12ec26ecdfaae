"""The functions that choose block sizes."""

from __future__ import annotations

import pytest
import torch
from njepa_kernels._runtime.blocks import (
    MAX_WIDTH,
    copy_tile,
    elementwise_tile,
    index_block,
    next_power_of_2,
    norm_tile,
    product_tile,
    row_tile,
    scatter_tile,
)

WIDTHS = [1, 3, 16, 30, 48, 64, 100, 192, 197, 384, 768, 1000, 1024, 1280, 1664, 2047, 2048]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize(
    ("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (2048, 2048)]
)
def test_next_power_of_2(n: int, power: int) -> None:
    assert next_power_of_2(n) == power


@pytest.mark.parametrize("width", WIDTHS)
def test_tiles_are_powers_of_two_and_bounded(width: int) -> None:
    for dtype in DTYPES:
        for program_bytes in (4096, 8192):
            tile = copy_tile(width, dtype, program_bytes)
            assert _power(tile.rows)
            assert _power(tile.block_d)
            assert 16 <= tile.block_d <= 512
            assert tile.rows * tile.block_d * dtype.itemsize == program_bytes
    rows = row_tile(width)
    assert rows.block_d >= width
    assert rows.block_d < 2 * max(width, 8.5)
    assert 1024 <= rows.rows * rows.block_d <= 2048
    norm, element = norm_tile(width), elementwise_tile(width)
    assert width <= norm.block_d < 2 * max(width, 8.5)
    assert norm.rows * norm.block_d == 256 * norm.num_warps
    assert 16 <= element.block_d <= 256
    assert element.rows * element.block_d == 1024
    scatter = scatter_tile(width)
    assert scatter.block_d == max(16, next_power_of_2(width))
    assert scatter.rows * scatter.block_d == 4096


@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280])
def test_no_idle_lane_at_vit_widths(width: int) -> None:
    for dtype in DTYPES:
        assert width % copy_tile(width, dtype).block_d == 0
    assert 4 * width % elementwise_tile(4 * width).block_d == 0


def test_wider_rows_are_cut_into_columns_that_leave_little_idle() -> None:
    assert row_tile(MAX_WIDTH).block_d == MAX_WIDTH
    for width in (MAX_WIDTH + 1, 2304, 4096, 6144):
        tile = row_tile(width)
        assert tile.rows * tile.block_d == 1024
        assert -(-width // tile.block_d) * tile.block_d < 1.5 * width
        assert scatter_tile(width).block_d == MAX_WIDTH


def test_index_block() -> None:
    assert [index_block(k) for k in (0, 1, 16, 17, 64, 1000)] == [16, 16, 16, 32, 64, 64]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_product_tile(arch: int) -> None:
    small, large = product_tile(128, arch), product_tile(8192, arch)
    assert (small.block, large.block) == (32, 64)
    for tile in (small, large):
        # Two fp32 operands per stage; tl.dot needs at least 16 in every direction.
        assert 2 * tile.block * tile.block_k * 4 * tile.num_stages <= 100 * 1024
        assert min(tile.block, tile.block_k) >= 16
