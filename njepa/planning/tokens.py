"""How many tokens the steps of a run have, from masks drawn as the run would draw them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from njepa.config import Config, ConfigError, MaskConfig
from njepa.config.deepspeed_file import BatchSizes
from njepa.draws.masks import MaskSampler
from njepa.planning.network import Shape

#: Steps whose masks are drawn, and images at most among which the shortest context is sought. More
#: images would shorten it, so costs are over- and never under-estimated by the second.
STEPS, IMAGES = 64, 2048


def drawn_shapes(config: Config, sizes: BatchSizes) -> Counter[Shape]:
    """How often each shape occurs in ``STEPS`` steps of this run.

    The shortest context of the global micro-batch (``mask.compat=fixed``) or of a rank's
    (``upstream``) is everyone's, so Kc falls with the batch.

    Raises:
        ConfigError: contexts of different lengths.
    """
    if config.mask.ragged:
        raise ConfigError(
            "mask.ragged=true is not covered by `njepa plan`: every image has its own number of "
            "context tokens; plan with mask.ragged=false, where contexts are shorter"
        )
    images = sizes.micro * (sizes.world if config.mask.compat == "fixed" else 1)
    return _drawn(config.mask, config.grid, config.run.seed, min(images, IMAGES))


@lru_cache(maxsize=256)
def _drawn(mask: MaskConfig, grid: tuple[int, int], seed: int, images: int) -> Counter[Shape]:
    sampler, ids = MaskSampler(mask, grid, seed, images), np.arange(images, dtype=np.int64)
    masks = (sampler(step, ids) for step in range(STEPS))
    return Counter(Shape(m.context_idx.shape[-1], m.target_idx.shape[-1]) for m in masks)


def largest(shapes: Iterable[Shape]) -> Shape:
    """The largest Kc and the largest Kt, of whichever steps."""
    counts = list(shapes)
    return Shape(max(s.context for s in counts), max(s.target for s in counts))
