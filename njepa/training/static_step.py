"""A training step whose inputs lie still: what a CUDA graph can repeat.

A graph repeats kernels with the numbers and addresses of its capture. So whatever changes from step
to step is a tensor here, in memory that stays: images, indices, sigma, sample ids, the number of
the micro-step, learning rate, weight decay and momentum. The seed is that of the set-up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from njepa.data.batch import Batch, Masks, Noise
from njepa.training.schedules import Rates
from njepa.training.step import StepResult, TrainState, training_step


class Shape(NamedTuple):
    """Of a batch: two with the same are the same kernels with other numbers."""

    images: torch.Size
    context: torch.Size
    targets: torch.Size


class StaticStep:
    """``training_step`` of one micro-batch, from buffers: the same bits, whatever the device.

    ``load`` writes them, ``step`` touches nothing else that changes, and reads nothing on the host:
    two calls for one shape run the same operators with the same arguments on the same memory.

    Raises:
        ValueError: micro-batches of other sizes or another seed than the first one, or ragged.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._first: Batch | None = None
        self._batches: dict[Shape, Batch] = {}

    def load(self, batch: Batch, rates: Rates) -> Shape:
        """Take over the inputs of the next step; returns which ``step`` that is."""
        if self._first is None:
            self._first = self._buffers(batch)
        masks, own = batch.masks, self._first
        shape = Shape(batch.images.shape, masks.context_idx.shape, masks.target_idx.shape)
        self._check(batch, own)
        if shape not in self._batches:
            still = Masks(masks.context_idx.clone(), masks.target_idx.clone())
            self._batches[shape] = own._replace(masks=still)
        into = self._batches[shape]
        pairs = [(into.images, batch.images), *zip(into.masks[:2], masks[:2], strict=True)]
        if batch.noise is not None:
            assert into.noise is not None
            if batch.noise.key.seed != into.noise.key.seed:
                raise ValueError(
                    f"the noise of a captured step keeps its seed, {into.noise.key.seed}, got "
                    f"{batch.noise.key.seed}; build the step anew"
                )
            pairs += [(into.noise.sigma, batch.noise.sigma)]
            pairs += [(into.noise.key.sample_ids, batch.noise.key.sample_ids)]
            self._micro_step.fill_(batch.noise.key.step)
        for buffer, value in pairs:
            buffer.copy_(value, non_blocking=True)
        for buffer, number in zip(self._numbers, rates, strict=True):
            buffer.fill_(number)
        return shape

    def step(self, shape: Shape) -> StepResult:
        """One step on what was loaded; the result lies in memory of its own."""
        return training_step(self._state, [self._batches[shape]], self._rates)

    def _buffers(self, batch: Batch) -> Batch:
        """Those that all shapes share; memory is made here, and in ``load`` for the masks."""
        device = batch.images.device
        self._micro_step = torch.zeros((), dtype=torch.int64, device=device)
        self._numbers = [torch.zeros((), dtype=torch.float64, device=device) for _ in Rates._fields]
        self._rates = Rates(*self._numbers)
        noise = None
        if batch.noise is not None:
            ids = batch.noise.key.sample_ids.clone()
            key = batch.noise.key._replace(step=self._micro_step, sample_ids=ids)
            noise = Noise(batch.noise.sigma.clone(), key)
        return batch._replace(images=batch.images.clone(), noise=noise)

    @staticmethod
    def _check(batch: Batch, own: Batch) -> None:
        if batch.masks.context_lengths is not None:
            raise ValueError(
                "a captured step takes contexts of one length, got ragged ones; set "
                "mask.ragged=false"
            )
        if batch.images.shape != own.images.shape or (batch.noise is None) != (own.noise is None):
            raise ValueError(
                f"a captured step takes micro-batches like its first one, {_told(own)}, got "
                f"{_told(batch)}"
            )


def _told(batch: Batch) -> str:
    return f"{list(batch.images.shape)} with{'out' if batch.noise is None else ''} noise"


def owned(result: StepResult, batch: Batch) -> StepResult:
    """The result of a step on ``batch``, copied from memory that the next one writes over."""
    update, (seen,) = result

    def copy(x: Tensor) -> Tensor:
        return x.clone()

    norms = None if update.norms is None else copy(update.norms)
    update = update._replace(bad=copy(update.bad), norm=copy(update.norm), norms=norms)
    seen = seen._replace(
        masks=batch.masks,
        cut_frac=batch.cut_frac,
        metrics={name: copy(value) for name, value in seen.metrics.items()},
        features=copy(seen.features),
        sample_ids=batch.sample_ids,
    )
    return StepResult(update, [seen])
