"""Low-shot probe: logistic regression on the features of a few labelled images of each class.

Source: the low-shot protocol of MSN (arXiv 2204.07141) and StoP: standardised features, L2 penalty
0.0025 / n. Our reading: features are standardised with the statistics of all training images, which
needs no labels (the published code takes each side's own), the intercept stays, and the lists are
drawn from a seed (``splits.few_labels``) rather than published ones.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from njepa.evaluation.features import standardised
from njepa.evaluation.logistic import correct, fit
from njepa.evaluation.splits import few_labels

SHOTS, LISTS = (1, 2, 5, 10), 5
PENALTY = 0.0025
#: Student's t, 97.5 %, for 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class LowShotResult:
    lists: tuple[float, ...]
    """Percent right with each list."""

    def as_json(self) -> dict[str, Any]:
        """Mean over the lists with the 95 % interval of that mean (Student's t)."""
        mean, n = statistics.mean(self.lists), len(self.lists)
        t = _STUDENT[min(n - 1, len(_STUDENT)) - 1]
        half = t * statistics.stdev(self.lists) / math.sqrt(n)
        return {
            "top1": round(mean, 2),
            "ci95": [round(max(0.0, mean - half), 2), round(min(100.0, mean + half), 2)],
            "lists": [round(value, 2) for value in self.lists],
        }


def lowshot_probe(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    names: list[str],
    shots: tuple[int, ...] = SHOTS,
    seed: int = 0,
) -> dict[int, LowShotResult]:
    """Accuracies for each number of labelled images of a class, over ``LISTS`` fixed lists.

    Raises:
        ConfigError: a class has fewer training images than that.
    """
    train, test = standardised(train, test)
    chosen = {  # all of them first: a class that is too small should not cost the others' time
        n: [few_labels(labels.cpu(), names, n, seed + k).to(labels.device) for k in range(LISTS)]
        for n in shots
    }
    results = {}
    for n, lists in chosen.items():
        right = [
            correct(fit(train[ids], labels[ids], PENALTY / len(ids)), test, test_labels)
            for ids in lists
        ]
        results[n] = LowShotResult(tuple(100 * count / len(test) for count in right))
    return results
