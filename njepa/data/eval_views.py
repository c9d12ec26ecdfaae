"""The deterministic view of an image that evaluation uses."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from njepa.data.decode import decode, resize
from njepa.data.errors import DecodeError
from njepa.data.index import ImageIndex

logger = logging.getLogger(__name__)

_MARGIN = 256 / 224  # the usual resize before the central crop
GREY = 128


def eval_images(index: ImageIndex, ids: npt.NDArray[np.int64], image_size: int) -> Tensor:
    """Central views, uint8 [n, 3, S, S]: shorter side to round(S·256/224), bilinear with
    antialiasing, then the central S x S pixels. Small images are enlarged by the same rule.

    An unreadable image becomes uniform grey (so it counts as an error of the classifier); one
    warning names and counts them.
    """
    images = torch.full((len(ids), 3, image_size, image_size), GREY, dtype=torch.uint8)

    def fill(slot: int) -> str:
        try:
            images[slot] = central_view(decode(index.read(int(ids[slot]))), image_size)
        except (OSError, DecodeError) as error:
            return f"{index.name(int(ids[slot]))} ({error})"
        return ""

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        unreadable = [reason for reason in pool.map(fill, range(len(ids))) if reason]
    if unreadable:
        logger.warning(
            "%d of %d evaluation images are unreadable and were replaced by grey: %s",
            len(unreadable),
            len(ids),
            "; ".join(unreadable[:5]),
        )
    return images


def central_view(image: Tensor, side: int) -> Tensor:
    """The view of one image, uint8 [3, H, W] to [3, side, side]."""
    height, width = image.shape[1:]
    scale = round(side * _MARGIN) / min(height, width)
    height, width = round(height * scale), round(width * scale)
    resized = resize(image, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resized[:, top : top + side, left : left + side]
