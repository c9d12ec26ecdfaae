"""Monitors: what they report on tensors with a known answer."""

import math

import pytest
import torch

from njepa.runs.monitors import FeatureMonitor, MetricMeans, mean_cosine, rankme


def test_rankme_of_known_spectra():
    assert rankme(torch.eye(8)).item() == pytest.approx(8, rel=1e-4)
    assert rankme(torch.ones(50, 8)).item() == pytest.approx(1, rel=1e-3)
    two = torch.zeros(10, 6)
    two[0, 0], two[1, 1] = 3.0, 1.0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(two).item() == pytest.approx(math.exp(entropy), rel=1e-3)


def test_feature_monitor_keeps_the_last_images_only():
    monitor = FeatureMonitor(capacity=6)
    assert monitor.read() == {}
    old, new = torch.full((4, 3, 2), 100.0), torch.randn(6, 3, 2, generator=torch.manual_seed(0))
    monitor.add(old.mean(1))
    pooled = new.mean(1)
    monitor.add(pooled)
    assert monitor.read()["feature_std"] == pytest.approx(pooled.std(0).mean().item(), rel=1e-5)
    assert monitor.read()["rankme"] == pytest.approx(rankme(pooled).item(), rel=1e-5)


def test_collapse_shows():
    healthy, collapsed = FeatureMonitor(), FeatureMonitor()
    x = torch.randn(256, 4, 32, generator=torch.manual_seed(0))
    healthy.add(x.mean(1))
    collapsed.add((1.0 + 1e-3 * x).mean(1))
    assert healthy.read()["feature_std"] > 0.4
    assert collapsed.read()["feature_std"] < 1e-2
    assert healthy.read()["rankme"] > 25
    assert collapsed.read()["rankme"] < 2


def test_features_that_are_not_finite_do_not_count():
    monitor, rows = FeatureMonitor(), torch.randn(9, 4, generator=torch.manual_seed(0))
    bad = rows.clone()
    bad[2, 1], bad[5, 3] = float("nan"), float("inf")
    monitor.add(bad)
    kept = rows[[0, 1, 3, 4, 6, 7, 8]]
    assert monitor.read()["rankme"] == pytest.approx(rankme(kept).item(), rel=1e-5)
    assert monitor.read()["feature_std"] == pytest.approx(kept.std(0).mean().item(), rel=1e-5)
    empty = FeatureMonitor()
    empty.add(torch.full((3, 4), float("nan")))
    assert empty.read() == {}


GOOD, BAD = torch.tensor(False), torch.tensor(True)


def test_means_leave_bad_steps_out():
    means = MetricMeans()
    nan = torch.tensor(float("nan"))
    means.add({"loss": torch.tensor(1.0), "loss_noise": torch.tensor(4.0)}, GOOD, k_context=10)
    means.add({"loss": torch.tensor(3.0), "loss_noise": torch.tensor(6.0)}, GOOD, k_context=20)
    assert means.steps == 2
    assert means.read() == {"loss": 2.0, "loss_noise": 5.0, "k_context": 15.0}
    assert means.read() == {}
    means.add({"loss": nan, "loss_noise": torch.tensor(100.0)}, BAD, k_context=10)
    means.add({"loss": torch.tensor(1.0), "loss_noise": torch.tensor(2.0)}, GOOD, k_context=20)
    assert means.read() == {"loss": 1.0, "loss_noise": 2.0, "k_context": 15.0}
    means.add({"loss": nan}, BAD, k_context=10)
    assert means.read() == {"k_context": 10.0}  # nothing to tell of the loss


def test_mean_cosine_of_pairs():
    rows = torch.randn(7, 5, generator=torch.manual_seed(0)) + 0.5
    pairs = [
        torch.cosine_similarity(rows[i], rows[j], dim=0)
        for i in range(7)
        for j in range(7)
        if i != j
    ]
    assert mean_cosine(rows).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    assert mean_cosine(rows[:1].expand(4, 5) * torch.rand(4, 1)).item() == pytest.approx(1)
    assert mean_cosine(torch.eye(3)).item() == pytest.approx(0, abs=1e-7)
    monitor = FeatureMonitor()
    monitor.add(rows)
    assert monitor.read()["feature_cosine"] == mean_cosine(rows).item()
