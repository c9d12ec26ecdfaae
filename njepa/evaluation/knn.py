"""Weighted k-nearest-neighbour classification on the cosine of frozen features.

The protocol of instance discrimination (Wu et al. 2018): each of the k nearest training images
votes for its class with exp(cosine / T).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Accuracy(NamedTuple):
    """Share of correct answers in percent, with its 95 % Wilson interval."""

    top1: float
    low: float
    high: float
    n: int


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int,
    temperature: float,
) -> Accuracy:
    """Top-1 accuracy of the vote.

    Args:
        train, test: features [n, D], [m, D]; L2-normalised here.
        k: neighbours, at most n (fewer training images: all of them vote).
        temperature: T > 0.
    """
    bank, k = F.normalize(train, dim=1), min(k, len(train))
    classes = int(train_labels.max()) + 1
    correct = 0
    for x, y in zip(test.split(1024), test_labels.split(1024), strict=True):
        cosine, nearest = (F.normalize(x, dim=1) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(x), classes)
        votes.scatter_add_(1, train_labels[nearest], (cosine / temperature).exp())
        correct += int((votes.argmax(1) == y).sum())
    return wilson(correct, len(test_labels))


def wilson(correct: int, n: int, z: float = 1.959964) -> Accuracy:
    """Wilson's score interval for ``correct`` out of ``n``, in percent."""
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Accuracy(100 * p, 100 * (centre - half), 100 * (centre + half), n)
