"""Steps whose loss or gradient is not finite: skipped alike on every rank, and counted.

The verdict stays on the device. A loss that is not finite gets a gradient that is not finite
(``gate``), the reduction of the gradients carries that to every rank, and the global norm of the
gradient shows it: no collective of its own, nothing read on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NonFiniteLoss(RuntimeError):
    """Loss or gradient was not finite in too many steps in a row; the weights are the last good.

    Attributes:
        step: steps done. row_began: those before the row.
    """

    def __init__(self, message: str, step: int, row_began: int) -> None:
        super().__init__(message)
        self.step, self.row_began = step, row_began


def gate(loss: Tensor) -> Tensor:
    """``loss`` with its own gradient, or with one that is NaN where the loss is not finite.

    Elsewhere the gradient is multiplied by 1, which keeps every bit.
    """
    return loss * torch.ones_like(loss).masked_fill(~loss.detach().isfinite(), float("nan"))


def skip_where(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """The next step of a fused optimizer of torch changes nothing where ``bad`` (bool, 0-dim).

    Weights, moments and step counts stay: what torch's ``GradScaler`` asks of these optimizers.
    """
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]


class StepNote(NamedTuple):
    """What is kept of a step until the next log line, on the device."""

    step: int
    """Steps done before it."""
    bad: Tensor
    """bool, 0-dim, the same on all ranks."""
    terms: Sequence[Mapping[str, Tensor]]
    """Metrics of each micro-batch of this rank."""
    norms: Tensor | None
    """Norm of each parameter's gradient; None where no rank holds a whole one (ZeRO 1 to 3)."""


class BadReading(NamedTuple):
    """What happened since the last reading; equal on all ranks, because the verdicts are."""

    notes: list[StepNote]
    """Of the bad steps."""
    in_a_row: int
    """The most of them; a row that continues counts from its beginning."""
    row_began: int
    """Steps that were done before that row."""


class BadSteps:
    """Remembers steps until somebody asks which of them were skipped; one read for all of them."""

    def __init__(self) -> None:
        self._notes: list[StepNote] = []
        self._row = 0

    def add(self, note: StepNote) -> None:
        self._notes.append(note)

    def read(self) -> BadReading:
        """A host sync."""
        if not self._notes:
            return BadReading([], 0, 0)
        verdicts = torch.stack([note.bad for note in self._notes]).tolist()
        longest, began = self._row, self._notes[0].step - self._row
        for note, bad in zip(self._notes, verdicts, strict=True):
            self._row = (self._row + 1) * bad
            if self._row > longest:
                longest, began = self._row, note.step + 1 - self._row
        notes = [n for n, bad in zip(self._notes, verdicts, strict=True) if bad]
        self._notes = []
        return BadReading(notes, longest, began)
