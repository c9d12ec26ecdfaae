"""How often each straight piece of a Triton kernel runs, over all programs of a launch.

Triton keeps the loops of the source, so a piece runs as often as the source says. Not here is
``_sum_by_index_kernel``: it goes on until each sample has no more tokens at a patch, which only the
indices know, and most lanes of a round are masked off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._runtime.launch import cdiv

if TYPE_CHECKING:
    from .._runtime.launch import Launch

#: Pieces that access memory in their order, from the launch's arguments by name and its programs.
_RUNS: dict[str, Callable[[dict[str, Any], int], list[int]]] = {
    # The weight; the rows; the partial sums.
    "_add_layer_norm_bwd_kernel": lambda a, n: [n, n * cdiv(a["rows_each"], a["ROWS"]), n],
    "_bias_gelu_bwd_kernel": lambda a, n: [n, n * cdiv(a["rows_each"], a["ROWS"]), n],
    "_column_sums_kernel": lambda a, n: [n * cdiv(a["n_rows"], a["ROWS"]), n],
    # The indices; one round of rows for each block of them, at most, if none is there twice; dx.
    "_gather_tokens_bwd_kernel": lambda a, n: [*[n * cdiv(a["k"], a["BLOCK_K"])] * 2, n],
    # The context, its copies; the queries, with noise in two pieces about one that draws it.
    "_predictor_tokens_fwd_kernel": lambda a, n: [
        (first := a["context_tiles"] * cdiv(a["D"], a["BLOCK_D"])),
        first * a["n_blocks"],
        *[n - first] * (3 if a["HAS_SIGMA"] else 1),
    ],
    "_predictor_tokens_bwd_context_kernel": lambda a, n: [n * a["n_blocks"], n],
    "_predictor_tokens_bwd_target_kernel": lambda a, n: [n * a["per_program"], n],
    "_vicreg_stats_kernel": lambda a, n: [*[n * cdiv(a["n"], a["BLOCK_N"])] * 2, n],
    "_vicreg_spread_kernel": lambda a, n: [n * a["views"], n * a["views"], n],
    # Below the diagonal nothing but a zero; above it what is loaded ahead, and the last rounds of
    # the loop load nothing.
    "_vicreg_product_kernel": lambda a, n: [
        n - (pairs := n * (a["tiles"] + 1) // (2 * a["tiles"])),
        pairs,
        pairs * (cdiv(a["D"] if a["SAMPLES"] else a["n"], a["BLOCK_K"]) - a["num_stages"] + 1),
        pairs,
    ],
    # The loops; what follows each are three numbers.
    "_vicreg_bwd_kernel": lambda a, n: [n * a["views"], n, n * a["views"], n],
}
#: Bytes of an access that moves data, where that is not the widest one.
DATA_WIDTH = {"_column_sums_kernel": 4}


def runs(launch: Launch) -> list[int] | None:
    """Of each piece with an access; None: the kernel is not listed, as straight ones are not."""
    found = _RUNS.get(launch.kernel.__name__)
    if found is None:
        return None
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.meta
    return found(named | {"tiles": launch.grid[0]}, math.prod(launch.grid))
