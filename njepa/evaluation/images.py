"""Labelled images for a probe: which of a source, their classes, their pixels."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from njepa.config import ConfigError
from njepa.data.eval_views import eval_images
from njepa.data.index import ImageIndex
from njepa.draws.streams import permutation

Int64Array = npt.NDArray[np.int64]

_CHUNK = 1024  # images decoded at a time: a warning names the unreadable ones of a chunk


@dataclass(frozen=True)
class LabelledImages:
    """Decoded centre views, kept as bytes so that several networks can be compared on them."""

    images: Tensor
    """uint8 [n, 3, S, S]."""
    labels: Tensor
    """int64 [n]."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """uint8 [B, 3, S, S]."""
        yield from self.images.split(batch_size)


def subset(index: ImageIndex, limit: int | None, seed: int) -> Int64Array:
    """Sample ids of at most ``limit`` images of an index, a fixed random subset beyond that."""
    ids = np.arange(index.n)
    if limit is not None and index.n > limit:
        ids = np.sort(permutation(seed, 0, index.n)[:limit])
    return ids


def load_split(
    index: ImageIndex, limit: int, image_size: int, seed: int, labels: Int64Array
) -> LabelledImages:
    """``subset`` of an index, decoded; ``labels``: of the whole index."""
    ids = subset(index, limit, seed)
    images = eval_images(index, ids, image_size)
    return LabelledImages(torch.as_tensor(images), torch.as_tensor(labels[ids]).long())


def stream(
    index: ImageIndex, ids: Int64Array, image_size: int, batch_size: int
) -> Iterator[Tensor]:
    """Centre views of ``ids`` in their order, uint8 [B, 3, S, S]; decoded one chunk ahead."""
    step = max(batch_size, _CHUNK // batch_size * batch_size)
    chunks = [ids[i : i + step] for i in range(0, len(ids), step)]
    with ThreadPoolExecutor(1) as ahead:
        waiting = [ahead.submit(eval_images, index, chunk, image_size) for chunk in chunks[:1]]
        for following in [*chunks[1:], None]:
            images = waiting.pop().result()
            if following is not None:
                waiting.append(ahead.submit(eval_images, index, following, image_size))
            yield from images.split(batch_size)


def align_classes(train: ImageIndex, test: ImageIndex) -> Int64Array:
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
