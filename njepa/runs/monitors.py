"""What tells a healthy run from a collapsing one, without a host sync between two log lines."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor


class FeatureMonitor:
    """Ring buffer of mean-pooled target features of the last ``capacity`` images.

    ``feature_std``: standard deviation over images, averaged over dimensions. ``rankme``:
    exp(entropy of the normalised singular values), the effective rank of Garrido et al. 2023
    (RankMe, eq. 2); between 1 (collapsed) and min(images, D).
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._rows: Tensor | None = None
        self._next = 0

    def add(self, h: Tensor) -> None:
        """Take the target features of a batch, [B, N, D]."""
        pooled = h.detach().float().mean(1)
        if self._rows is None:
            capacity = self._capacity or max(512, 2 * pooled.shape[1])
            self._rows = pooled.new_empty(capacity, pooled.shape[1])
        where = torch.arange(self._next, self._next + len(pooled), device=pooled.device)
        self._rows[where % len(self._rows)] = pooled
        self._next += len(pooled)

    def read(self) -> dict[str, float]:
        """The two numbers over what is in the buffer (a host sync; call when logging)."""
        if self._rows is None or self._next < 2:
            return {}
        rows = self._rows[: self._next]
        return {
            "feature_std": rows.std(0).mean().item(),
            "rankme": rankme(rows).item(),
        }


def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """Effective rank of [n, D] features: exp(−Σ p ln p), p = σ/Σσ + eps over singular values σ."""
    singular = torch.linalg.svdvals(features.float())
    p = singular / singular.sum() + eps
    return torch.exp(-(p * p.log()).sum())


class MetricMeans:
    """Means of 0-dim device tensors between two log lines; read once, in one transfer."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        """Micro-batches added since the last reading."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in metrics.items():
            value = value.detach().float()
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.clone()

    def add_counts(self, **counts: float) -> None:
        """Host numbers, averaged over micro-batches, not over ranks."""
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value

    def finite(self, group: dist.ProcessGroup | None = None) -> bool:
        """Whether every loss since the last reading is finite, on any rank (a host sync)."""
        if "loss" not in self._sums:
            return True
        total = self._sums["loss"].clone()
        if group is not None:
            dist.all_reduce(total, group=group)
        return bool(total.isfinite())

    def read(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Means over micro-batches and ranks; starts anew."""
        if not self._sums:
            return {}
        names, steps, counts = list(self._sums), self.steps, self._counts
        sums = torch.stack([*self._sums.values(), torch.full_like(self._sums[names[0]], steps)])
        if group is not None:
            dist.all_reduce(sums, group=group)
        *totals, count = sums.tolist()
        self._clear()
        means = {name: total / count for name, total in zip(names, totals, strict=True)}
        return means | {name: value / steps for name, value in counts.items()}


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
