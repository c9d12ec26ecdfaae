"""Multinomial logistic regression on frozen features, solved to convergence.

Full-batch L-BFGS: the linear probe of ``summary.json``, and the classifier of low-shot probes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from njepa.evaluation.accuracy import Accuracy, wilson
from njepa.evaluation.features import standardised

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def logistic_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> Accuracy:
    """Top-1 accuracy of the probe; features are float [n, D], labels int64 [n].

    Features are standardised with the statistics of ``train``; the L2 penalty is chosen on a tenth
    of the training images, so the test images decide nothing.
    """
    train, test = standardised(train, test)
    held_out = torch.arange(len(train)) % 10 == 0  # every tenth: splits are stored class by class
    best = max(
        PENALTIES,
        key=lambda penalty: correct(
            fit(train[~held_out], train_labels[~held_out], penalty),
            train[held_out],
            train_labels[held_out],
        ),
    )
    weights = fit(train, train_labels, best)
    return wilson(correct(weights, test, test_labels), len(test_labels))


def fit(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Weights [D + 1, C], the last row the intercepts, of the least

        mean cross-entropy + penalty/2 |W|²        (the intercepts are free).

    Args:
        x: [n, D]. y: int64 [n].
    """
    x = F.pad(x, (0, 1), value=1.0)
    weights = x.new_zeros(x.shape[1], int(y.max()) + 1).requires_grad_()
    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weights, y) + 0.5 * penalty * weights[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weights.detach()


def correct(weights: Tensor, x: Tensor, y: Tensor) -> int:
    """How many of the rows [n, D] get their label."""
    return int(((F.pad(x, (0, 1), value=1.0) @ weights).argmax(1) == y).sum())
