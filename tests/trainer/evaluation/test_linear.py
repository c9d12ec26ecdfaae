"""The linear probe's heads against torch's own SGD, and what may choose among them."""

import math

import pytest
import torch

from njepa.config import ConfigError
from njepa.draws.streams import permutation
from njepa.evaluation import linear
from njepa.evaluation.linear import Head, linear_probe
from njepa.evaluation.splits import few_labels, held_out
from tests.support.blobs import blobs

NAMES = ["a", "b", "c", "d", "e"]


def test_heads_are_trained_as_by_torch():
    """Autograd, torch.optim.SGD and CosineAnnealingLR, one head after the other."""
    x, y = (v.double() if v.is_floating_point() else v for v in blobs(600, 0))
    x = torch.nn.functional.pad(x, (0, 1), value=1.0)
    heads = [Head("mean", "none", 0.03, 0.0), Head("mean", "none", 0.3, 1e-2)]
    found = linear._train(x, y, heads, classes=5, seed=3, epochs=4)
    for head, matrix in zip(heads, found, strict=True):
        w = torch.zeros(16, 5, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        groups = [{"params": [w], "weight_decay": head.weight_decay}, {"params": [b]}]
        solver = torch.optim.SGD(groups, lr=head.lr, momentum=0.9)
        steps = 4 * math.ceil(600 / 256)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps)
        for epoch in range(4):
            for ids in torch.from_numpy(permutation(3, epoch, 600)).split(256):
                loss = torch.nn.functional.cross_entropy(x[ids, :-1] @ w + b, y[ids])
                solver.zero_grad()
                loss.backward()
                solver.step()
                schedule.step()
        torch.testing.assert_close(matrix, torch.cat([w, b[None]]).detach(), rtol=1e-6, atol=1e-8)


def test_the_probe_is_as_good_as_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    x, y = blobs(800, 0, spread=1.5)
    q, labels = blobs(400, 1, spread=1.5)
    expected = 100 * LogisticRegression(max_iter=1000).fit(x, y).score(q, labels)
    result = linear_probe({"mean": x}, y, {"mean": q}, labels, held_out(y, NAMES))
    assert result.test.top1 == pytest.approx(expected, abs=2.0)


def test_the_better_view_is_chosen_and_the_test_images_do_not_choose():
    x, y = blobs(400, 0)
    q, labels = blobs(100, 1)
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    train, test = {"last4": noise, "mean": x}, {"last4": noise[:100], "mean": q}
    chooses = held_out(y, NAMES)
    result = linear_probe(train, y, test, labels, chooses, epochs=5)
    assert result.head.view == "mean"
    assert result.chosen[result.head] == max(result.chosen.values())
    shuffled = linear_probe(train, y, test, (labels + 1) % 5, chooses, epochs=5)
    assert (shuffled.head, shuffled.chosen) == (result.head, result.chosen)
    assert shuffled.test.top1 < 20 < result.test.top1


def test_the_split_that_chooses_trains_no_head():
    """Wrong labels in it change the scores, not the heads: with them every head scores badly."""
    x, y = blobs(400, 0)
    chooses = held_out(y, NAMES)
    wrong = torch.where(chooses, (y + 1) % 5, y)
    result = linear_probe({"mean": x}, wrong, {"mean": x}, y, chooses, epochs=5)
    assert max(result.chosen.values()) < 20


def test_a_head_that_diverged_is_not_chosen():
    x, y = blobs(400, 0)
    result = linear_probe({"mean": 1e20 * x}, y, {"mean": x}, y, held_out(y, NAMES), epochs=2)
    assert result.head.norm == "standardise"
    assert result.as_json()["split"]["worst"] == 0


def test_held_out_is_a_tenth_of_each_class():
    labels = torch.tensor([0] * 25 + [1] * 10 + [2] * 2 + [3])
    chosen = held_out(labels, NAMES)
    assert chosen.nonzero().flatten().tolist() == [0, 10, 20, 25, 35]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(labels[order][held_out(labels[order], NAMES)], minlength=4)
    assert counts.tolist() == [3, 1, 1, 0]
    with pytest.raises(ConfigError, match=r"two training images or more, got 2 images in 2 cl"):
        held_out(torch.tensor([0, 1]), ["a", "b"])


def test_few_labels_are_fixed_lists():
    labels = torch.arange(60) % 5
    lists = {n: few_labels(labels, NAMES, n, seed=1) for n in (1, 3)}
    for n, ids in lists.items():
        assert torch.bincount(labels[ids]).tolist() == [n] * 5
        assert torch.equal(ids, few_labels(labels, NAMES, n, seed=1))
    assert set(lists[1].tolist()) < set(lists[3].tolist())
    assert not torch.equal(lists[3], few_labels(labels, NAMES, 3, seed=2))
    with pytest.raises(ConfigError, match=r"class 'b' has 2; use --shots with at most 2"):
        few_labels(torch.tensor([0] * 9 + [1] * 2), NAMES, 3, seed=1)
