"""The standard deviation of the noise of each target block.

N-JEPA (arXiv 2507.15216), Algorithm 1: one fixed σ for all blocks. Its text also names EDM's
log-normal distribution of σ (arXiv 2206.00364, table 1), without saying how it enters: ``edm`` is
our reading. A list is ours (docs/method.md, section 3).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from njepa.config import NoiseConfig
from njepa.draws.streams import Int64Array, uniform

P_MEAN, P_STD = -1.2, 1.2  # ln σ of EDM's training distribution


def block_sigmas(
    config: NoiseConfig, n_targets: int, seed: int, step: int, sample_ids: Int64Array
) -> npt.NDArray[np.float32]:
    """σ of the M target blocks of G samples, fp32 [G, M]: a function of its arguments alone.

    A number: that for all. ``edm``: exp(-1.2 + 1.2 z), z ~ N(0, 1) for each image and block, or for
    each image with ``draw=shared``. A list of K values: each on M div K or M div K + 1 blocks of
    every image, all such arrangements equally likely.

    Args:
        step: 0-based optimizer step. sample_ids: [G].
    """
    shape, sigma = (len(sample_ids), n_targets), config.sigma
    if sigma == "edm":
        u = uniform(seed, "sigma", step, sample_ids, 1 if config.draw == "shared" else n_targets)
        # The middles of the cells of 2^-32: at 0 the quantile would be -inf.
        z = torch.special.ndtri(torch.from_numpy(u + 2.0**-33)).numpy()
        values = np.exp(P_MEAN + P_STD * z)
    elif isinstance(sigma, tuple):
        count = len(sigma)
        u = uniform(seed, "sigma", step, sample_ids, count + n_targets)
        # Values in random order, dealt out in turn, to blocks in random order.
        dealt = np.argsort(u[:, :count], axis=1)[:, np.arange(n_targets) % count]
        order = np.argsort(u[:, count:], axis=1)
        values = np.array(sigma)[np.take_along_axis(dealt, order, axis=1)]
    else:
        values = np.array(sigma)
    return np.ascontiguousarray(np.broadcast_to(values.astype(np.float32), shape))
