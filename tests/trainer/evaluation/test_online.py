"""Probes that follow a training: right numbers, no leak, and no trace in the run."""

import torch

from njepa.evaluation.knn import knn_accuracy
from njepa.evaluation.online import OnlineProbe


def data(n=2000, classes=4, width=12, spread=1.0):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (n,), generator=g)
    centres = torch.randn(classes, width, generator=g)
    tokens = centres[labels][:, None] + spread * torch.randn(n, 3, width, generator=g)
    return tokens, labels


def follow(probe, tokens, epochs=1, batch=50):
    readings = []
    for _ in range(epochs):
        for start in range(0, len(tokens), batch):
            ids = torch.arange(start, start + batch)
            probe.add(tokens[ids], ids)
        readings.append(probe.read())
    return readings


def test_both_probes_learn():
    tokens, labels = data(spread=1.5)
    first, second = follow(OnlineProbe(labels, "cpu"), tokens, epochs=2)
    assert second["online_linear_top1"] > 85
    assert second["online_knn_top1"] > 85
    assert first["online_linear_top1"] < second["online_linear_top1"]


def test_knn_is_the_vote_of_the_last_images():
    tokens, labels = data(spread=3.0)
    probe = OnlineProbe(labels, "cpu", bank=500, k=7)
    x, ids = tokens.mean(1), torch.arange(2000)
    follow(probe, tokens[:1950])
    bank = ids[1450:1950][ids[1450:1950] % 10 != 0]
    judged = torch.arange(1950, 2000, 10)
    probe.add(tokens[1950:], ids[1950:])
    expected = knn_accuracy(x[bank], labels[bank], x[judged], labels[judged], 7, 0.07)
    assert probe.read()["online_knn_top1"] == expected.top1


def test_images_that_are_scored_are_never_learnt():
    """Labels at random: whoever had seen those of the scored images would know them by now."""
    tokens, labels = data(width=64)
    random = torch.randint(0, 4, labels.shape, generator=torch.Generator().manual_seed(1))
    readings = follow(OnlineProbe(random, "cpu", k=1), tokens, epochs=4)
    assert readings[-1]["online_knn_top1"] < 40
    assert readings[-1]["online_linear_top1"] < 40


def test_nothing_of_the_run_is_touched():
    tokens, labels = data()
    tokens.requires_grad_()
    state, before = torch.get_rng_state(), tokens.detach().clone()
    probe = OnlineProbe(labels, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        follow(probe, tokens * 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tokens, before)
    assert tokens.grad is None
    assert not any(t.requires_grad for t in vars(probe).values() if torch.is_tensor(t))


def test_nothing_is_reported_where_nothing_was_scored():
    tokens, labels = data()
    probe = OnlineProbe(labels, "cpu")
    assert probe.read() == {}
    probe.add(tokens[1:9], torch.arange(1, 9))
    assert probe.read() == {}
    probe.add(tokens[9:11], torch.arange(9, 11))
    assert set(probe.read()) == {"online_linear_top1", "online_knn_top1"}
