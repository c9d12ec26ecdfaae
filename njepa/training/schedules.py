"""Learning rate, weight decay and EMA momentum as pure functions of the global step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from njepa.config import ConfigError, OptimConfig


class Rates(NamedTuple):
    """What one optimizer step is made with: numbers, or fp64 tensors, 0-dim, on the device."""

    lr: float | Tensor
    weight_decay: float | Tensor
    """Of the decayed group (``param_groups``)."""
    momentum: float | Tensor
    """Of the target encoder, for its update after this step."""

    def write(self, groups: list[dict[str, Any]]) -> None:
        """Set learning rate and weight decay in the groups of an optimizer."""
        for group in groups:
            group["lr"] = self.lr
            if group["decayed"]:
                group["weight_decay"] = self.weight_decay


class Schedules:
    """The published schedules (facebookresearch/ijepa, src/utils/schedulers.py, src/train.py).

    T = int(schedule_scale * total_steps), W warm-up steps, i the 0-based step, t = i + 1 (published
    schedulers are stepped before use):

        lr  = lr_start + t/W (lr - lr_start)                                       t < W
              lr_final + (lr - lr_final)/2 (1 + cos(pi (t - W)/(T - W)))           t >= W, cosine
              lr                                                                   t >= W, constant
        wd  = wd_final + (wd - wd_final)/2 (1 + cos(pi t/T))
        ema = m_0 + i/T (m_1 - m_0)

    The constant learning rate is not from that code: N-JEPA (arXiv 2507.15216, section 4.4).
    """

    def __init__(self, optim: OptimConfig, total_steps: int, warmup_steps: int) -> None:
        """``total_steps``: of the training, >= 1. ``warmup_steps``: 0 .. total_steps.

        Raises:
            ConfigError: the warm-up does not fit into the training.
        """
        if total_steps < 1:
            raise ConfigError(f"a training needs at least 1 step, got {total_steps}")
        if not 0 <= warmup_steps <= total_steps:
            raise ConfigError(
                f"the warm-up must fit into the training, got {warmup_steps} warm-up steps of "
                f"{total_steps}; lower optim.warmup_epochs or raise optim.epochs (run.max_steps)"
            )
        self.optim, self.total, self.warmup = optim, total_steps, warmup_steps
        self.period = int(optim.schedule_scale * total_steps)

    def at(self, step: int) -> Rates:
        """Values for the 0-based optimizer step ``step``.

        Raises:
            ValueError: step outside [0, total_steps).
        """
        if not 0 <= step < self.total:
            raise ValueError(f"step must be in [0, {self.total}), got {step}")
        o, t = self.optim, step + 1
        if t < self.warmup:
            lr = o.lr_start + t / self.warmup * (o.lr - o.lr_start)
        elif o.lr_shape == "constant":
            lr = o.lr
        else:
            done = (t - self.warmup) / max(1, self.period - self.warmup)
            lr = max(o.lr_final, _cosine(o.lr, o.lr_final, done))
        wd = _cosine(o.weight_decay, o.weight_decay_final, t / self.period)
        # As published: the end value bounds the cosine against rounding, in either direction.
        bound = max if o.weight_decay_final <= o.weight_decay else min
        wd = bound(o.weight_decay_final, wd)
        ema = o.ema[0] + step * (o.ema[1] - o.ema[0]) / self.period
        return Rates(lr, wd, ema)


def _cosine(start: float, end: float, done: float) -> float:
    """From start (done = 0) to end (done = 1) along half a cosine."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * done))
