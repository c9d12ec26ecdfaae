"""Masks as text: which patch of an image is context, which one a target."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

from njepa.data.batch import Batch, Masks

_NAMES = "123456789abcdefghijklmnopqrstuvwxyz"
_WIDTH = 100  # characters of a terminal that two pictures may take


def masks_text(batch: Batch, name: Callable[[int], str], grid: tuple[int, int]) -> str:
    """The masks of the first images of a micro-batch, side by side, with what they mean.

    Args:
        name: of a sample.
        grid: patches, rows by columns.
    """
    images, column = [], 2 * grid[1] + 1
    count = min(len(batch.sample_ids), max(1, _WIDTH // (column + 2)), 4)
    for i in range(count):
        images.append(_picture(batch.masks, i, grid))
    names = [f"{i + 1}: {name(int(batch.sample_ids[i]))}" for i in range(count)]
    lines = [
        "  ".join(line.ljust(column) for line in row).rstrip()
        for row in zip_longest(*images, fillvalue="")
    ]
    legend = "o context, 1 2 ... target block, + several target blocks, . neither"
    return "\n".join([f"first masks ({legend}):", *names, "", *lines])


def _picture(masks: Masks, image: int, grid: tuple[int, int]) -> list[str]:
    """A line for each row of patches."""
    cells = ["."] * (grid[0] * grid[1])
    kept = masks.context_idx[image].tolist()
    if masks.context_lengths is not None:
        kept = kept[: masks.context_lengths.counts[image]]
    for patch in kept:
        cells[patch] = "o"
    for block, patches in enumerate(masks.target_idx[image].tolist()):
        for patch in patches:
            cells[patch] = _NAMES[block % len(_NAMES)] if cells[patch] in ".o" else "+"
    return [" ".join(cells[row * grid[1] : (row + 1) * grid[1]]) for row in range(grid[0])]
