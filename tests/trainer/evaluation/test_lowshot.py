"""Low-shot probe: fixed lists, and the numbers of an independent solver."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from njepa.evaluation.lowshot import LISTS, lowshot_probe
from njepa.evaluation.splits import few_labels
from tests.support.blobs import blobs

NAMES = ["a", "b", "c", "d", "e"]


def test_accuracies_are_those_of_a_reference_solver():
    x, y = blobs(400, 0, spread=1.5)
    q, labels = blobs(300, 1, spread=1.5)
    found = lowshot_probe(x, y, q, labels, NAMES, shots=(2, 5), seed=4)
    mean, std = x.mean(0), x.std(0)
    for shots, result in found.items():
        assert len(result.lists) == LISTS
        for k, top1 in enumerate(result.lists):
            ids = few_labels(y, NAMES, shots, 4 + k)
            # scikit-learn weighs the sum of the losses by C, we the penalty of their mean.
            solver = LogisticRegression(C=1 / 0.0025, max_iter=5000, tol=1e-8)
            solver.fit(((x - mean) / std)[ids], y[ids])
            expected = 100 * solver.score((q - mean) / std, labels)
            assert top1 == pytest.approx(expected, abs=1.5)
    assert np.mean(found[5].lists) > np.mean(found[2].lists)
    again = lowshot_probe(x, y, q, labels, NAMES, shots=(5,), seed=4)
    assert again[5] == found[5]


def test_the_interval_is_that_of_the_mean_over_lists():
    x, y = blobs(200, 0, spread=2.0)
    result = lowshot_probe(x, y, x, y, NAMES, shots=(1,))[1]
    mean, error = np.mean(result.lists), np.std(result.lists, ddof=1) / np.sqrt(5)
    low, high = result.as_json()["ci95"]
    assert (low, high) == pytest.approx((mean - 2.776 * error, mean + 2.776 * error), abs=0.01)
    assert torch.tensor(result.lists).std() > 0
