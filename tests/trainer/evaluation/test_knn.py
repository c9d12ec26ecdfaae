"""kNN and linear probe against independent implementations."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from njepa.evaluation.accuracy import wilson
from njepa.evaluation.knn import knn_accuracies, knn_accuracy
from njepa.evaluation.logistic import logistic_accuracy
from tests.support.blobs import blobs


@pytest.mark.parametrize("k", [1, 7, 20])
def test_knn_equals_a_vote_by_hand(k):
    x, y = blobs(300, 0)
    q, labels = blobs(120, 1)
    correct = 0
    for row, label in zip(q, labels, strict=True):
        cosine = torch.nn.functional.cosine_similarity(row[None], x)
        nearest = cosine.argsort(descending=True)[:k]
        votes = [
            sum(float((cosine[i] / 0.07).exp()) for i in nearest if y[i] == c) for c in range(5)
        ]
        correct += int(np.argmax(votes)) == int(label)
    accuracy = knn_accuracy(x, y, q, labels, k, 0.07)
    assert accuracy.top1 == pytest.approx(100 * correct / 120)
    assert accuracy.low < accuracy.top1 < accuracy.high


def test_knn_with_fewer_images_than_neighbours_uses_all():
    x, y = blobs(10, 0, classes=2)
    assert knn_accuracy(x, y, x, y, 200, 0.01).top1 == 100


def test_wilson_interval():
    """Values of the closed form at 8 of 10 (Wilson 1927), and its edges."""
    result = wilson(8, 10)
    assert (result.low, result.high) == pytest.approx((49.02, 94.33), abs=0.01)
    assert wilson(0, 50).low == pytest.approx(0, abs=1e-9)
    assert wilson(50, 50).high == pytest.approx(100)


def test_linear_probe_is_as_good_as_a_reference_solver():
    x, y = blobs(800, 0, spread=1.5)
    q, labels = blobs(400, 1, spread=1.5)
    scaler = StandardScaler().fit(x.numpy())
    reference = LogisticRegression(max_iter=1000).fit(scaler.transform(x.numpy()), y.numpy())
    expected = 100 * reference.score(scaler.transform(q.numpy()), labels.numpy())
    result = logistic_accuracy(x, y, q, labels)
    assert result.top1 == pytest.approx(expected, abs=2.0)
    assert result.top1 > 60


def test_one_search_serves_every_k():
    x, y = blobs(300, 0, spread=2.0)
    q, labels = blobs(200, 1, spread=2.0)
    found = knn_accuracies(x, y, q, labels, (1, 10, 200), 0.07)
    assert found == {k: knn_accuracy(x, y, q, labels, k, 0.07) for k in (1, 10, 200)}
    assert len({accuracy.top1 for accuracy in found.values()}) == 3
