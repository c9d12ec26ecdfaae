"""Frozen features of labelled images: an encoder's tokens, mean-pooled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from njepa.config import Config, ConfigError
from njepa.data.eval_views import eval_images
from njepa.data.index import ImageIndex
from njepa.draws.streams import permutation


@dataclass(frozen=True)
class LabelledImages:
    """Decoded centre views, kept as bytes so that several networks can be compared on them."""

    images: Tensor
    """uint8 [n, 3, S, S]."""
    labels: Tensor
    """int64 [n]."""

    def __len__(self) -> int:
        return len(self.labels)


def load_split(
    index: ImageIndex, limit: int, image_size: int, seed: int, labels: np.ndarray
) -> LabelledImages:
    """At most ``limit`` images of an index, a fixed random subset beyond that."""
    ids = np.arange(index.n)
    if index.n > limit:
        ids = np.sort(permutation(seed, 0, index.n)[:limit])
    images = eval_images(index, ids, image_size)
    return LabelledImages(torch.as_tensor(images), torch.as_tensor(labels[ids]).long())


def align_classes(train: ImageIndex, test: ImageIndex) -> np.ndarray:
    """Labels of ``test`` in the numbering of ``train``'s classes.

    Raises:
        ConfigError: no labels, or a class that the training side does not have.
    """
    labels = test.labels_in(train.classes)
    if labels is None or (labels < 0).any():
        unknown = ", ".join(sorted(set(test.classes) - set(train.classes))[:5])
        raise ConfigError(
            f"the classes of the test images in {test.root} must be among those of {train.root}, "
            f"got {unknown or 'images without class folders'}; set data.eval_path to a folder "
            f"with the same class folders, or unset it"
        )
    return labels


@torch.no_grad()
def pooled_features(
    encode: Callable[[Tensor], Tensor], data: LabelledImages, config: Config, device: torch.device
) -> Tensor:
    """Mean over tokens of ``encode(images)`` ([B, N, D]): float32 [n, D] on the CPU."""
    rows = [encode(x).float().mean(1).cpu() for x in _batches(data, config, device)]
    return torch.cat(rows)


def raw_pixels(data: LabelledImages, side: int = 16) -> Tensor:
    """The floor to beat: images shrunk to ``side`` x ``side``, flattened, float32."""
    small = nn.functional.interpolate(
        data.images.float(), size=(side, side), mode="bilinear", antialias=True
    )
    return (small / 255 - 0.5).flatten(1)


def _batches(data: LabelledImages, config: Config, device: torch.device) -> Iterator[Tensor]:
    for chunk in data.images.split(config.eval.batch_size):
        yield chunk.to(device).permute(0, 2, 3, 1)
