"""Steps whose loss or gradient is not finite: skipped alike on every rank, and counted.

The verdict stays on the device. A loss that is not finite gets a gradient that is not finite
(``gate``), the reduction of the gradients carries that to every rank, and the global norm of the
gradient shows it: no collective of its own, nothing read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteLoss(RuntimeError):
    """Loss or gradient was not finite in too many steps in a row; the weights are the last good."""


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


class BadSteps:
    """Counts skipped steps on the device; equal on all ranks, because the verdict is."""

    def __init__(self, device: torch.device) -> None:
        #: Since the last reading, in a row up to now, and in a row at most since the last reading.
        self._new, self._row, self._longest = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, bad: Tensor) -> None:
        """Take the verdict on a step, bool, 0-dim."""
        self._new = self._new + bad
        self._row = (self._row + 1) * bad
        self._longest = torch.maximum(self._longest, self._row)

    def read(self) -> tuple[int, int]:
        """Bad steps since the last reading, and the most in a row; a host sync.

        A row that continues counts from its beginning.
        """
        new, longest = torch.stack((self._new, self._longest)).tolist()
        self._new, self._longest = torch.zeros_like(self._new), self._row
        return int(new), int(longest)
