"""Linear probe on frozen features: multinomial logistic regression, solved to convergence.

Full-batch L-BFGS on standardised features; the L2 penalty is chosen on a tenth of the training
images, so the test images decide nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from njepa.evaluation.knn import Accuracy, wilson

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def linear_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> Accuracy:
    """Top-1 accuracy of the probe; features are float [n, D], labels int64 [n]."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    held_out = torch.arange(len(train)) % 10 == 0  # every tenth: splits are stored class by class
    best = max(
        PENALTIES,
        key=lambda penalty: _correct(
            _fit(train[~held_out], train_labels[~held_out], penalty),
            train[held_out],
            train_labels[held_out],
        ),
    )
    weights = _fit(train, train_labels, best)
    return wilson(_correct(weights, test, test_labels), len(test_labels))


def _fit(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    x = F.pad(x, (0, 1), value=1.0)
    weights = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weights, y) + 0.5 * penalty * weights[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weights.detach()


def _correct(weights: Tensor, x: Tensor, y: Tensor) -> int:
    return int(((F.pad(x, (0, 1), value=1.0) @ weights).argmax(1) == y).sum())
