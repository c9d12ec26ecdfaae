"""Linear probe on cached features: many heads at once, the best one chosen on a split of train.

A head is (view, norm, learning rate, weight decay); those of one view and norm share their input,
so one matrix product serves them all. Every head starts at zero and is trained by SGD with momentum
0.9 and a cosine from its learning rate to zero, on batches of 256 in the same order; the loss is
softmax cross-entropy, whose gradient is written out below. The head that is best on ``held_out`` is
trained again on all training images, and only that one meets the test images, once.

Sources: grids of heads on frozen features as in dinov2 (eval/linear.py), batch normalisation
without scale before the head as in MAE (arXiv 2111.06377, appendix A.1). On frozen features its
running statistics are constants, so ``standardise`` uses those of the training images. The grid
itself is our reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from njepa.draws.streams import permutation
from njepa.evaluation.accuracy import Accuracy, spread, wilson
from njepa.evaluation.features import standardised

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHT_DECAYS = (0.0, 1e-3, 1e-2)
NORMS = ("standardise", "none")
EPOCHS, BATCH, MOMENTUM = 50, 256, 0.9


class Head(NamedTuple):
    view: str
    norm: str
    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"{self.view}, {self.norm}, lr {self.lr:g}, wd {self.weight_decay:g}"


@dataclass(frozen=True)
class LinearResult:
    test: Accuracy
    head: Head
    """The best one on the split of train."""
    chosen: dict[Head, float]
    """Percent right on that split, of every head."""
    predicted: Tensor
    """int64 [m], classes of the test rows."""

    def as_json(self) -> dict[str, Any]:
        """Test accuracy, the head, and how far the heads spread on the split of train."""
        return {
            **self.test.as_json(),
            "head": self.head._asdict(),
            "split": spread(self.chosen.values()),
        }


def linear_probe(
    train: dict[str, Tensor],
    labels: Tensor,
    test: dict[str, Tensor],
    test_labels: Tensor,
    chooses: Tensor,
    seed: int = 0,
    epochs: int = EPOCHS,
) -> LinearResult:
    """Choose among all heads of all views, then test one.

    Args:
        train, test: features [n, F], [m, F] of each view.
        labels, test_labels: int64 [n], [m].
        chooses: bool [n], training images that choose (``splits.held_out``).
        seed: of the order of the batches.
    """
    scores: dict[Head, float] = {}
    classes = int(labels.max()) + 1
    for view, features in train.items():
        for norm in NORMS:
            x, y = _normalised(norm, features[~chooses], features[chooses])
            heads = [Head(view, norm, lr, wd) for lr in LEARNING_RATES for wd in WEIGHT_DECAYS]
            weights = _train(x, labels[~chooses], heads, classes, seed, epochs)
            for head, matrix in zip(heads, weights, strict=True):
                scores[head] = 100 * _correct(matrix, y, labels[chooses]) / len(y)
    best = max(scores, key=lambda head: scores[head])  # the first of equals
    x, y = _normalised(best.norm, train[best.view], test[best.view])
    (matrix,) = _train(x, labels, [best], classes, seed, epochs)
    accuracy = wilson(_correct(matrix, y, test_labels), len(test_labels))
    return LinearResult(accuracy, best, scores, (y @ matrix).argmax(1))


def _normalised(norm: str, train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with a column of ones, which carries the bias."""
    if norm == "standardise":
        train, other = standardised(train, other)
    with_ones = (torch.nn.functional.pad(x, (0, 1), value=1.0) for x in (train, other))
    return next(with_ones), next(with_ones)


def _train(x: Tensor, y: Tensor, heads: list[Head], classes: int, seed: int, epochs: int) -> Tensor:
    """Weights [H, F + 1, C] of the heads, the last row the bias.

    With p = softmax(x W) the gradient of the mean cross-entropy is x^T (p - onehot(y)) / B. Weight
    decay is added to it as in torch's SGD, but not for the bias.
    """
    lr, decay = (
        torch.tensor(values, device=x.device)[:, None]
        for values in ([h.lr for h in heads], [h.weight_decay for h in heads])
    )
    decay = decay.expand(x.shape[1], -1, 1).clone()
    decay[-1] = 0
    # One matrix of all heads, [F + 1, H C], and its view [F + 1, H, C].
    flat = x.new_zeros(x.shape[1], len(heads) * classes)
    weights, velocity = flat.view(-1, len(heads), classes), None
    step, total = 0, epochs * math.ceil(len(x) / BATCH)
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(seed, epoch, len(x))).to(x.device)
        for ids in order.split(BATCH):
            rows = x[ids]
            error = (rows @ flat).view(len(ids), len(heads), classes).softmax(-1)
            error[torch.arange(len(ids), device=x.device), :, y[ids]] -= 1
            gradient = (rows.T @ error.flatten(1)).div_(len(ids)).view_as(weights)
            gradient += decay * weights
            velocity = gradient if velocity is None else velocity.mul_(MOMENTUM).add_(gradient)
            rate = 0.5 * (1 + math.cos(math.pi * step / total))
            weights -= rate * lr * velocity
            step += 1
    return weights.transpose(0, 1)


def _correct(weights: Tensor, x: Tensor, y: Tensor) -> int:
    """How many rows get their label; a head that diverged to NaN gets none right."""
    logits = x @ weights
    return int(((logits.argmax(1) == y) & logits.isfinite().all(1)).sum())
