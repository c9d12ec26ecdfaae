"""The images of the page: what a training step saw of them, and the views that evaluation uses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from njepa_kernels import NoiseKey
from torch import Tensor

from njepa.config import Config
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.data.batch import Masks, Noise, as_masks
from njepa.data.eval_views import GREY, eval_images
from njepa.data.index import ImageIndex
from njepa.data.torch_loader import PlannedImages
from njepa.draws.masks import DrawnMasks, MaskSampler
from njepa.draws.order import Planned, SampleOrder
from njepa.draws.sigmas import block_sigmas
from njepa.draws.streams import Int64Array, permutation, stream_seed
from njepa.report.record import RunRecord, number


@dataclass(frozen=True)
class StepViews:
    """The first images of a micro-batch of rank 0, as the training gets them."""

    images: Tensor
    """uint8 [n, S, S, 3]: cropped, resized, flipped."""
    masks: Masks
    noise: Noise | None
    step: int
    """Optimizer steps done before."""
    names: list[str]
    grid_side: int
    """Patches per row."""
    unreadable: list[str]
    """Images in whose place others are shown, with the reason."""


class _FirstImages(SampleOrder):
    """The order of a run, of which the first ``count`` images of a micro-batch are read."""

    count = 1

    def at(self, micro_step: int) -> Planned:
        plan = super().at(micro_step)
        return plan._replace(ids=plan.ids[: self.count])


def step_views(run: RunRecord, config: Config, index: ImageIndex, count: int) -> StepViews:
    """Images, masks and noise of the step after the checkpoint of ``run``, or its last line.

    They are those of the training, bit for bit: masks follow the batch of all ranks.

    Raises:
        ConfigError: no usable ``ds.json``, or a source with fewer images than a step.
        DataError: an image and all that could replace it cannot be read.
    """
    sizes = parse_deepspeed(run.ds).resolve(int(number(run.state.get("world")) or 1))
    saved = number(run.state.get("step"))
    seed, step = config.run.seed, run.last_step if saved is None else int(saved)
    order = _FirstImages(index.n, sizes.micro, sizes.accumulation, sizes.world, 0, seed)
    order.count = count
    micro_step = step * sizes.accumulation
    plan = order.at(micro_step)
    pixels = PlannedImages(config.data, seed, index, order).load(micro_step)
    together = config.mask.compat == "fixed"
    ids = plan.global_ids if together else plan.global_ids[: sizes.micro]
    drawn = MaskSampler(config.mask, config.grid, seed, len(ids))(micro_step, ids)
    masks = as_masks(DrawnMasks(*(array[:count] for array in drawn)), config.mask.ragged)
    noise = None
    if config.noise.active:
        sigma = block_sigmas(config.noise, config.mask.n_targets, seed, plan.step, plan.ids)
        sample_ids = torch.from_numpy(plan.ids.copy())
        shared = config.noise.draw == "shared"
        key = NoiseKey(stream_seed(seed, "noise"), micro_step, sample_ids, shared)
        noise = Noise(torch.from_numpy(sigma.copy()), key)
    names = [index.name(int(i)) for i in plan.ids]
    unreadable = [f"{index.name(sample)} ({reason})" for sample, reason in pixels.unreadable]
    return StepViews(pixels.images, masks, noise, step, names, config.grid[1], unreadable)


@dataclass(frozen=True)
class Gallery:
    """Central views of some images of a source, with what they are called."""

    images: Tensor
    """uint8 [n, S, S, 3]."""
    names: list[str]
    classes: list[str | None]

    @property
    def grey(self) -> list[str]:
        """Those that could not be read (``eval_images``)."""
        same = (self.images == GREY).flatten(1).all(1)
        return [name for name, one in zip(self.names, same.tolist(), strict=True) if one]


def gallery(index: ImageIndex, ids: Int64Array, image_size: int) -> Gallery:
    """The images ``ids``; one that cannot be read is grey."""
    images = eval_images(index, ids, image_size).permute(0, 2, 3, 1).contiguous()
    classes = [
        None if index.labels is None else index.classes[index.labels[i]] for i in ids.tolist()
    ]
    return Gallery(images, [index.name(int(i)) for i in ids], classes)


def some_ids(index: ImageIndex, count: int, seed: int) -> Int64Array:
    """A fixed choice of at most ``count`` sample ids: of different classes as far as there are."""
    order = permutation(seed, 0, index.n)
    if index.labels is None:
        return order[:count]
    _, first = np.unique(index.labels[order], return_index=True)
    spread = order[np.sort(first)[:count]]
    rest = order[~np.isin(order, spread)][: count - len(spread)]
    return np.concatenate([spread, rest])
