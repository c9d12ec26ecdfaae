"""Which samples a rank sees at a step: a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from njepa.config import ConfigError
from njepa.draws.streams import permutation

Int64Array = npt.NDArray[np.int64]


class Planned(NamedTuple):
    """One micro-batch before anything is read."""

    micro_step: int
    """``step * accumulation + j``, counted from the start of the training."""
    step: int
    epoch: int
    global_ids: Int64Array
    """[world * micro_batch]: the samples of all ranks, rank after rank."""
    ids: Int64Array
    """[micro_batch]: this rank's slice of ``global_ids``."""


class SampleOrder:
    """Without replacement within an epoch, reshuffled every epoch, equal step counts on all ranks.

    The samples of a step are a contiguous slice of the epoch's permutation, cut into micro-batches
    and those into ranks. So one rank with batch 2B sees what two ranks with batch B see together.
    What does not fill a last step of an epoch is left out (other samples each epoch).

    Args:
        n: samples in the source.
        micro_batch: samples per rank and forward pass.
        accumulation: micro-batches per optimizer step.
        world: ranks. rank: this one.
        seed: ``run.seed``, or ``seed_of_try`` of it.

    Raises:
        ConfigError: fewer samples than one step needs. ValueError: a number out of range.
    """

    def __init__(
        self, n: int, micro_batch: int, accumulation: int, world: int, rank: int, seed: int
    ) -> None:
        for name, value in (
            ("micro_batch", micro_batch),
            ("accumulation", accumulation),
            ("world", world),
        ):
            if value < 1:
                raise ValueError(f"SampleOrder: {name} must be at least 1, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"SampleOrder: rank must be in [0, {world}), got {rank}")
        self.n, self.micro_batch, self.accumulation = n, micro_batch, accumulation
        self.world, self.rank, self.seed = world, rank, seed
        self.global_batch = micro_batch * accumulation * world
        self.steps_per_epoch = n // self.global_batch
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"the source has {n} images, but one step needs {self.global_batch} "
                f"(micro-batch {micro_batch} x accumulation {accumulation} x {world} ranks); "
                f"lower train_micro_batch_size_per_gpu or gradient_accumulation_steps in the "
                f"DeepSpeed file, or add images"
            )
        self._permutations: dict[int, Int64Array] = {}

    def at(self, micro_step: int) -> Planned:
        """The micro-batch of this rank at ``micro_step`` >= 0."""
        step, epoch, start = self._place(micro_step)
        order = self._order(epoch)
        size = self.world * self.micro_batch
        global_ids = order[start : start + size]
        mine = slice(self.rank * self.micro_batch, (self.rank + 1) * self.micro_batch)
        return Planned(micro_step, step, epoch, global_ids, global_ids[mine])

    def replacements(self, micro_step: int, slot: int) -> Iterator[int]:
        """Samples to take, in this order, when the one at ``slot`` of ``ids`` cannot be read.

        They are the next ones of the epoch's permutation, whoever reads those too: the same
        for every number of ranks. At most one global batch of them.
        """
        _, epoch, start = self._place(micro_step)
        order = self._order(epoch)
        first = start + self.rank * self.micro_batch + slot + 1
        for k in range(min(self.global_batch, self.n - 1)):
            yield int(order[(first + k) % self.n])

    def _place(self, micro_step: int) -> tuple[int, int, int]:
        if micro_step < 0:
            raise ValueError(f"SampleOrder: micro_step must be at least 0, got {micro_step}")
        step, j = divmod(micro_step, self.accumulation)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch + j * self.world * self.micro_batch
        return step, epoch, start

    def _order(self, epoch: int) -> Int64Array:
        if epoch not in self._permutations:
            # Two are kept: a loader that reads ahead asks for both around the end of an epoch.
            self._permutations = dict(list(self._permutations.items())[-1:])
            order = permutation(self.seed, epoch, self.n)
            order.setflags(write=False)
            self._permutations[epoch] = order
        return self._permutations[epoch]
