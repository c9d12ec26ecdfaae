"""The two block sizes that all images of a step share, and every size that a step can draw.

Source: Assran et al., arXiv:2301.08243, and facebookresearch/ijepa, src/masks/multiblock.py.
"""

from __future__ import annotations

import math

from njepa.config import Range

Size = tuple[int, int]
_Steps = tuple[int, int, int]


def block_size(r: float, scale: Range, aspect: Range, grid: Size, largest: Size) -> Size:
    """Height and width of a block from one number r in [0, 1].

    With s and a at the fraction r of their ranges and A = int(H W s): h = round(sqrt(A a)) and
    w = round(sqrt(A / a)), halves to even, at most ``largest``. One r sets both area and aspect, as
    published: small blocks are wide, large ones tall.
    """
    _, h, w = _area_and_sides(r, scale, aspect, grid)
    return min(h, largest[0]), min(w, largest[1])


def possible_sizes(scale: Range, aspect: Range, grid: Size, largest: Size) -> set[Size]:
    """Every value of ``block_size`` for r = 0, 2^-32, ..., 1 - 2^-32 (and 1)."""

    # Area and height grow with r and the width shrinks while the area stands: two draws that agree
    # in all three have nothing else between them, so bisection finds every step.
    def between(low: int, high: int, at_low: _Steps, at_high: _Steps) -> set[_Steps]:
        if at_low == at_high or high - low == 1:
            return {at_low, at_high}
        middle = (low + high) // 2
        at_middle = at(middle)
        return between(low, middle, at_low, at_middle) | between(middle, high, at_middle, at_high)

    def at(word: int) -> _Steps:
        return _area_and_sides(word * 2.0**-32, scale, aspect, grid)

    steps = between(0, 2**32, at(0), at(2**32))
    return {(min(h, largest[0]), min(w, largest[1])) for _, h, w in steps}


def _area_and_sides(r: float, scale: Range, aspect: Range, grid: Size) -> _Steps:
    area = int(grid[0] * grid[1] * (scale[0] + r * (scale[1] - scale[0])))
    ratio = aspect[0] + r * (aspect[1] - aspect[0])
    return area, round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
