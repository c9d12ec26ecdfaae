"""What tells a healthy run from a collapsing one, without a host sync between two log lines."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class FeatureMonitor:
    """Ring buffer of the target features of the last ``capacity`` images, averaged over patches.

    ``feature_std``: standard deviation over images, averaged over dimensions. ``rankme``:
    exp(entropy of the normalised singular values), the effective rank of Garrido et al. 2023
    (RankMe, eq. 2); between 1 (collapsed) and min(images, D). ``feature_cosine``: mean cosine of
    the features of two different images; 1: collapsed.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._rows: Tensor | None = None
        self._next = 0

    def add(self, features: Tensor) -> None:
        """Take the mean features of a batch, [B, D]."""
        if self._rows is None:
            capacity = self._capacity or max(512, 2 * features.shape[1])
            self._rows = features.new_empty(capacity, features.shape[1])
        where = torch.arange(self._next, self._next + len(features), device=features.device)
        self._rows[where % len(self._rows)] = features
        self._next += len(features)

    def read(self) -> dict[str, float]:
        """The three numbers over what is in the buffer and finite (a host sync; when logging)."""
        if self._rows is None:
            return {}
        rows = self._rows[: self._next]
        rows = rows[rows.isfinite().all(1)]
        if len(rows) < 2:
            return {}
        numbers = torch.stack([rows.std(0).mean(), rankme(rows), mean_cosine(rows)])
        return dict(zip(("feature_std", "rankme", "feature_cosine"), numbers.tolist(), strict=True))


def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """Effective rank of [n, D] features: exp(−Σ p ln p), p = σ/Σσ + eps over singular values σ."""
    singular = torch.linalg.svdvals(features.float())
    p = singular / singular.sum() + eps
    return torch.exp(-(p * p.log()).sum())


def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine of two different rows of [n, D]: (‖Σᵢ x̂ᵢ‖² − Σᵢ ‖x̂ᵢ‖²) / (n (n − 1))."""
    unit, n = F.normalize(features.double(), dim=1), len(features)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))).float()


class MetricMeans:
    """Means of 0-dim device tensors between two log lines; read once, in one transfer."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        """Micro-batches added since the last reading."""
        self._sums: dict[str, Tensor] = {}
        self._count: Tensor | None = None
        self._host: dict[str, float] = {}

    def add(self, metrics: dict[str, Tensor], bad: Tensor, **counts: float) -> None:
        """Take the metrics of a micro-batch; those of a bad step do not count.

        Args:
            bad: bool, 0-dim, equal on all ranks: its step was skipped.
            counts: host numbers, averaged over all micro-batches of this rank.
        """
        self.steps += 1
        for name, value in metrics.items():
            value = value.detach().float().masked_fill(bad, 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        one = torch.ones((), device=bad.device).masked_fill(bad, 0.0)
        self._count = one if self._count is None else self._count + one
        for name, number in counts.items():
            self._host[name] = self._host.get(name, 0) + number

    def read(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Means over micro-batches and ranks; starts again. All steps bad: host numbers only."""
        if self._count is None:
            return {}
        names, host = list(self._sums), {k: v / self.steps for k, v in self._host.items()}
        sums = torch.stack([*self._sums.values(), self._count])
        if group is not None:
            dist.all_reduce(sums, group=group)
        *totals, count = sums.tolist()
        self._clear()
        if not count:
            return host
        return {name: total / count for name, total in zip(names, totals, strict=True)} | host


class Stopwatch:
    """Seconds of training between two log lines; evaluation and checkpoints do not count."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return max(seconds, 1e-9)
