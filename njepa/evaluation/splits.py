"""Which training images choose, which fit, and which few have labels; never the test images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from njepa.config import ConfigError
from njepa.draws.streams import permutation

_SHARE = 10  # one image in ten chooses


def held_out(labels: Tensor, names: Sequence[str]) -> Tensor:
    """Bool [n]: the images that choose settings, every tenth of each class by its sample ids.

    A class of one image only fits; one of two to ten gives its first.

    Raises:
        ConfigError: no class has two images.
    """
    rank, counts = _ranks(labels.numpy(), np.arange(len(labels)))
    chosen = torch.from_numpy((rank % _SHARE == 0) & (counts[labels.numpy()] > 1))
    if not chosen.any():
        raise ConfigError(
            f"choosing settings needs a class with two training images or more, got "
            f"{len(labels)} images in {len(names)} classes; give --train more images, or probe "
            f"with --kind knn"
        )
    return chosen


def few_labels(labels: Tensor, names: Sequence[str], shots: int, seed: int) -> Tensor:
    """Sample numbers of ``shots`` images of each class, int64, ascending.

    A function of the labels, ``shots`` and ``seed`` alone; the list of fewer shots is a part of the
    list of more.

    Raises:
        ConfigError: a class has fewer images than that.
    """
    order = permutation(seed, 0, len(labels))
    rank, counts = _ranks(labels.numpy(), order)
    if counts.min() < shots:
        poorest = int(counts.argmin())
        raise ConfigError(
            f"low-shot with {shots} images a class needs as many in each, but class "
            f"{names[poorest]!r} has {counts[poorest]}; use --shots with at most {counts[poorest]}"
        )
    return torch.from_numpy(np.flatnonzero(rank < shots))


def _ranks(labels: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of each image among those of its class when read in ``order``; images per class."""
    counts = np.bincount(labels)
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.concatenate([np.arange(n) for n in counts])
    return rank, counts
