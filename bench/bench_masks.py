"""Masks of a batch: the vectorised sampler against the published per-sample algorithm.

    python -m pytest bench/bench_masks.py --benchmark-only

The opponent (``impl=eager``) is ``bench/published/masks.py``: torch, one image and block at a time,
as the published collator works. Its masks and ours are checked before they are timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.published.masks import PublishedCollator
from njepa.config import MaskConfig
from njepa.draws.masks import MaskSampler

SIZES = [(14, 128), (14, 2048), (16, 128), (28, 128)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Loader processes have one thread each; the per-sample code is no faster with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(context: np.ndarray, targets: np.ndarray, side: int, batch: int, keep: int) -> None:
    assert context.shape[0] == targets.shape[0] == batch
    assert min(context.shape[-1], targets.shape[-1]) > keep
    for indices in (context, targets):
        assert (np.diff(indices, axis=-1) > 0).all()
        assert indices.min() >= 0
        assert indices.max() < side * side
    for kept, held in zip(context, targets, strict=True):
        assert not np.isin(kept, held).any()


@pytest.mark.parametrize("impl", ["eager", "upstream", "fixed", "static"])
@pytest.mark.parametrize(("side", "batch"), SIZES, ids=[f"{s}x{s}-b{b}" for s, b in SIZES])
def test_masks(benchmark: Any, side: int, batch: int, impl: str) -> None:
    """``eager``: per sample, as published; ``upstream`` and ``fixed``: ours, by ``mask.compat``;
    ``static``: ``fixed`` with ``mask.static_shapes``."""
    config = MaskConfig(
        compat="fixed" if impl in ("fixed", "static") else "upstream",
        static_shapes=impl == "static",
    )
    steps = itertools.count()
    draw: Callable[[], tuple[np.ndarray, np.ndarray]]
    if impl == "eager":
        torch.manual_seed(0)
        collate = PublishedCollator((side, side), min_keep=config.min_keep)

        def draw() -> tuple[np.ndarray, np.ndarray]:
            (context,), targets = collate(batch)
            return context.numpy(), torch.stack(targets, dim=1).numpy()
    else:
        sampler = MaskSampler(config, (side, side), seed=0, batch=batch)
        ids = np.arange(batch, dtype=np.int64)

        def draw() -> tuple[np.ndarray, np.ndarray]:
            masks = sampler(next(steps), ids)
            return masks.context_idx, masks.target_idx

    context, targets = draw()
    check(context, targets, side, batch, config.min_keep)
    rounds = 5 if impl == "eager" and batch > 1000 else 40 if impl == "eager" else 400
    benchmark.pedantic(draw, rounds=rounds, warmup_rounds=2)
    benchmark.extra_info.update(
        op="masks",
        size=f"{side}x{side}-b{batch}",
        dtype="int64",
        impl=impl,
        mode="fwd",
        bytes=int(context.nbytes + targets.nbytes),
        flops=0,
        images_per_s=batch / benchmark.stats.stats.median if benchmark.stats else None,
    )
