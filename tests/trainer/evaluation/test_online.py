"""Probes that follow a training: right numbers, no leak, and no trace in the run."""

import torch

from njepa.evaluation.knn import knn_accuracy
from njepa.evaluation.online import OnlineProbe


def data(n=2000, classes=4, width=12, spread=1.0):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (n,), generator=g)
    centres = torch.randn(classes, width, generator=g)
    return centres[labels] + spread * torch.randn(n, width, generator=g), labels


def follow(probe, x, epochs=1, batch=50):
    readings = []
    for _ in range(epochs):
        for start in range(0, len(x), batch):
            ids = torch.arange(start, start + batch)
            probe.add(x[ids], ids)
        readings.append(probe.read())
    return readings


def test_both_probes_learn():
    x, labels = data(spread=1.0)
    first, second = follow(OnlineProbe(labels, "cpu"), x, epochs=2)
    assert second["online_linear_top1"] > 85
    assert second["online_knn_top1"] > 85
    assert first["online_linear_top1"] < second["online_linear_top1"]


def test_knn_is_the_vote_of_the_last_images():
    x, labels = data(spread=2.0)
    probe = OnlineProbe(labels, "cpu", bank=500, k=7)
    ids = torch.arange(2000)
    follow(probe, x[:1950])
    bank = ids[1450:1950][ids[1450:1950] % 10 != 0]
    judged = torch.arange(1950, 2000, 10)
    probe.add(x[1950:], ids[1950:])
    expected = knn_accuracy(x[bank], labels[bank], x[judged], labels[judged], 7, 0.07)
    assert probe.read()["online_knn_top1"] == expected.top1


def test_images_that_are_scored_are_never_learnt():
    """Labels at random: whoever had seen those of the scored images would know them by now."""
    x, labels = data(width=64)
    random = torch.randint(0, 4, labels.shape, generator=torch.Generator().manual_seed(1))
    readings = follow(OnlineProbe(random, "cpu", k=1), x, epochs=4)
    assert readings[-1]["online_knn_top1"] < 40
    assert readings[-1]["online_linear_top1"] < 40


def test_nothing_of_the_run_is_touched():
    x, labels = data()
    x.requires_grad_()
    state, before = torch.get_rng_state(), x.detach().clone()
    probe = OnlineProbe(labels, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        follow(probe, x * 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert x.grad is None
    assert not any(t.requires_grad for t in vars(probe).values() if torch.is_tensor(t))


def test_nothing_is_reported_where_nothing_was_scored():
    x, labels = data()
    probe = OnlineProbe(labels, "cpu")
    assert probe.read() == {}
    probe.add(x[1:9], torch.arange(1, 9))
    assert probe.read() == {}
    probe.add(x[9:11], torch.arange(9, 11))
    assert set(probe.read()) == {"online_linear_top1", "online_knn_top1"}


def test_a_step_that_is_not_finite_is_left_out():
    x, labels = data()
    clean, probe = OnlineProbe(labels, "cpu"), OnlineProbe(labels, "cpu")
    first, bad = x[:50], x[50:100].clone()
    bad[3, 2] = float("nan")
    for p in (clean, probe):
        p.add(first, torch.arange(50))
        p.read()
    probe.add(bad, torch.arange(50, 100))
    assert probe.read() == {}
    readings = []
    for p in (clean, probe):  # the momentum continues, so the heads differ, but neither is lost
        for start in range(100, 1000, 50):
            p.add(x[start : start + 50], torch.arange(start, start + 50))
        readings.append(p.read())
    assert readings[0]["online_knn_top1"] == readings[1]["online_knn_top1"]
    assert readings[1]["online_linear_top1"] > 60
