"""Weighted k-nearest-neighbour classification on the cosine of frozen features.

The protocol of instance discrimination (Wu et al. 2018): each of the k nearest training images
votes for its class with exp(cosine / T).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from njepa.evaluation.accuracy import Accuracy, wilson


def knn_accuracies(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Accuracy]:
    """Top-1 accuracy of the vote for each k, from one search.

    Args:
        train, test: features [n, D], [m, D]; L2-normalised here.
        ks: neighbours, each at most n (fewer training images: all of them vote).
        temperature: T > 0.
    """
    bank, largest = F.normalize(train, dim=1), min(max(ks), len(train))
    classes = int(train_labels.max()) + 1
    correct = dict.fromkeys(ks, 0)
    for x, y in zip(test.split(1024), test_labels.split(1024), strict=True):
        cosine, nearest = (F.normalize(x, dim=1) @ bank.T).topk(largest, dim=1)
        weights, labels = (cosine / temperature).exp(), train_labels[nearest]
        for k in ks:
            votes = weights.new_zeros(len(x), classes)
            votes.scatter_add_(1, labels[:, :k], weights[:, :k])
            correct[k] += int((votes.argmax(1) == y).sum())
    return {k: wilson(n, len(test_labels)) for k, n in correct.items()}


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int,
    temperature: float,
) -> Accuracy:
    """``knn_accuracies`` for one k."""
    return knn_accuracies(train, train_labels, test, test_labels, (k,), temperature)[k]
