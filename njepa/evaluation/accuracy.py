"""A share of correct answers, with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch


class Accuracy(NamedTuple):
    """Share of correct answers in percent, with its 95 % Wilson interval."""

    top1: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, Any]:
        """``{"top1": percent, "ci95": [low, high]}``, rounded to hundredths."""
        return {"top1": round(self.top1, 2), "ci95": [round(self.low, 2), round(self.high, 2)]}


def wilson(correct: int, n: int, z: float = 1.959964) -> Accuracy:
    """Wilson's score interval for ``correct`` out of ``n``, in percent."""
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Accuracy(100 * p, 100 * (centre - half), 100 * (centre + half), n)


def report(name: str, accuracy: Accuracy) -> dict[str, Any]:
    """``{name: percent, name_ci95: [low, high]}``, as ``summary.json`` has it."""
    value = accuracy.as_json()
    return {name: value["top1"], f"{name}_ci95": value["ci95"]}


def spread(scores: Iterable[float]) -> dict[str, Any]:
    """How far the candidates of a choice lie apart: quartiles of their scores, in percent."""
    values = torch.tensor(list(scores), dtype=torch.float64)
    quartiles = {"best": 1.0, "median": 0.5, "lower_quartile": 0.25, "worst": 0.0}
    return {name: round(float(values.quantile(q)), 2) for name, q in quartiles.items()} | {
        "candidates": len(values)
    }
