"""The three prediction terms, and VICReg in both specifications, against plain loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from njepa.config import Config
from njepa.data.batch import Batch, Lengths
from njepa.models.jepa import Jepa, JepaOutput, build_jepa
from njepa.objectives import objective, prediction_loss, vicreg_loss
from njepa.training.ema import make_target
from tests.support.tiny import N_BLOCKS, make_batch, tiny_config


def forward(config: Config, batch: Batch) -> tuple[Jepa, JepaOutput, torch.Tensor]:
    jepa = build_jepa(config)
    with torch.no_grad():
        h = make_target(jepa.encoder)(batch.images)
    output = jepa(batch.images, batch.masks, batch.noise)
    return jepa, output, h


def targets(h: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """[B, M, Kt, D] layer-normed targets, by loops."""
    normal = F.layer_norm(h, h.shape[-1:])
    return torch.stack([torch.stack([normal[b, i] for i in idx[b]]) for b in range(len(h))])


def by_image(rows: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """[M*B, Kt, D] -> [B, M, Kt, D]."""
    batch, blocks, _ = idx.shape
    return torch.stack(
        [torch.stack([rows[m * batch + b] for m in range(blocks)]) for b in range(batch)]
    )


def smooth_l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    gap = (a - b).abs()
    return torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()


# Prediction terms


def test_ijepa_loss():
    config = tiny_config("ijepa")
    batch = make_batch(config)
    _, output, h = forward(config, batch)
    y = targets(h, batch.masks.target_idx)
    expected = smooth_l1(by_image(output.clean, batch.masks.target_idx), y)
    losses = objective(config, output, h, batch.masks)
    torch.testing.assert_close(losses.total, expected)
    assert losses.metrics.keys() == {"loss", "loss_clean"}
    assert torch.equal(losses.metrics["loss"], losses.total.detach())
    assert torch.equal(losses.metrics["loss_clean"], losses.total.detach())


@pytest.mark.parametrize("stop", ["none", "clean", "noised"])
@pytest.mark.parametrize("predictors", ["unshared", "shared"])
@pytest.mark.parametrize(
    ("weight", "consistency"), [(0.1, 0.1), (0.7, 0.0), (0.0, 0.4), (2.0, 3.0)]
)
def test_njepa_loss(predictors: str, stop: str, weight: float, consistency: float):
    """Values, and gradients to both predictions, of L_CT + lambda1 L_NT + lambda2 L_CN."""
    noise = {"predictors": predictors, "weight": weight, "consistency": consistency,
             "consistency_stop": stop}  # fmt: skip
    config = tiny_config("njepa", noise=noise)
    batch = make_batch(config)
    _, output, h = forward(config, batch)
    h.requires_grad_()
    losses = prediction_loss(config.noise, output, h, batch.masks)
    y = targets(h.detach(), batch.masks.target_idx)
    clean, noised = (by_image(x, batch.masks.target_idx) for x in (output.clean, output.noised))
    pair = {
        "none": (clean, noised),
        "clean": (clean.detach(), noised),
        "noised": (clean, noised.detach()),
    }[stop]
    terms = {
        "loss_clean": smooth_l1(clean, y),
        "loss_noise": smooth_l1(noised, y),
        "loss_consistency": (pair[0] - pair[1]).square().mean(),
    }
    total = terms["loss_clean"] + weight * terms["loss_noise"]
    total = total + consistency * terms["loss_consistency"]
    assert losses.metrics.keys() == terms.keys()
    for name, term in terms.items():
        torch.testing.assert_close(losses.metrics[name], term.detach(), rtol=1e-5, atol=0)
        assert not losses.metrics[name].requires_grad
    torch.testing.assert_close(losses.total, total, rtol=1e-5, atol=0)
    both = [output.clean, output.noised]
    expected = torch.autograd.grad(total, both, retain_graph=True, materialize_grads=True)
    got = torch.autograd.grad(losses.total, both, retain_graph=True, materialize_grads=True)
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-9)
    losses.total.backward()
    assert h.grad is None


def test_the_stop_decides_who_is_moved_by_the_difference():
    """The shares of the consistency term that each side of the stop takes away."""
    grads = {}
    for stop in ("none", "clean", "noised"):
        config = tiny_config("njepa", noise={"consistency": 5.0, "consistency_stop": stop})
        batch = make_batch(config)
        _, output, h = forward(config, batch)
        total = prediction_loss(config.noise, output, h, batch.masks).total
        grads[stop] = torch.autograd.grad(total, [output.clean, output.noised])
    for stop, stopped in (("clean", 0), ("noised", 1)):
        moved = 1 - stopped
        assert torch.equal(grads[stop][moved], grads["none"][moved])
        gap = (grads[stop][stopped] - grads["none"][stopped]).norm()
        assert gap > 0.1 * grads["none"][stopped].norm()


@pytest.mark.parametrize("weight", [0.1, 5.0])
def test_a_single_predictor_has_no_clean_loss_and_no_lambda(weight: float):
    config = tiny_config("njepa", noise={"predictors": "single", "weight": weight})
    batch = make_batch(config)
    _, output, h = forward(config, batch)
    losses = prediction_loss(config.noise, output, h, batch.masks)
    assert losses.metrics.keys() == {"loss_noise"}
    assert torch.equal(losses.total.detach(), losses.metrics["loss_noise"])
    expected = smooth_l1(
        by_image(output.noised, batch.masks.target_idx), targets(h, batch.masks.target_idx)
    )
    torch.testing.assert_close(losses.total, expected)


# VICReg


def variance(u: torch.Tensor, gamma: float = 1.0, eps: float = 1e-4) -> torch.Tensor:
    return (gamma - (u.var(dim=0, unbiased=True) + eps).sqrt()).relu().mean()


def covariance(u: torch.Tensor) -> torch.Tensor:
    centred = u - u.mean(dim=0)
    matrix = centred.T @ centred / (len(u) - 1)
    return (matrix - matrix.diag().diag()).square().sum() / u.shape[1]


def pair(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The published terms of one pair of views."""
    return (
        F.mse_loss(x, y),
        0.5 * variance(x) + 0.5 * variance(y),
        covariance(x) + covariance(y),
    )


def terms_of(losses: Any) -> tuple[torch.Tensor, ...]:
    return tuple(losses.metrics[f"vicreg_{name}"] for name in ("inv", "std", "cov"))


def check(losses: Any, expected: tuple[torch.Tensor, ...]) -> None:
    for got, want in zip(terms_of(losses), expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-6)
    total = 25 * expected[0] + 25 * expected[1] + expected[2]
    torch.testing.assert_close(losses.total.detach(), total.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("projector", [None, "identity", (16, 48)])
def test_pred_blocks_is_the_loop_over_ordered_pairs(projector: object):
    config = tiny_config("cjepa", vicreg={"projector": projector})
    batch = make_batch(config, batch=6)
    jepa, output, h = forward(config, batch)
    losses = vicreg_loss(config.vicreg, output, h, batch.masks, jepa.projector)
    u = jepa.projector(output.clean.mean(dim=1))
    views = [u[m * 6 : (m + 1) * 6] for m in range(N_BLOCKS)]
    pairs = [pair(views[i], views[j]) for i, j in itertools.permutations(range(N_BLOCKS), 2)]
    check(losses, tuple(sum(terms) / len(pairs) for terms in zip(*pairs, strict=True)))

    parameters = [p for p in jepa.parameters() if p.requires_grad]
    got = torch.autograd.grad(losses.total, parameters, retain_graph=True, allow_unused=True)
    loop = sum(25 * a + 25 * b + c for a, b, c in pairs) / len(pairs)
    want = torch.autograd.grad(loop, parameters, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w.norm() > 1e-5:
            assert (g - w).norm() / w.norm() < 1e-3


def test_pred_blocks_takes_the_clean_predictions_where_there_are_any():
    both = tiny_config("ncjepa", noise={"predictors": "unshared"})
    alone = tiny_config("cjepa")
    batch = make_batch(both)
    jepa, output, h = forward(both, batch)
    plain_jepa, plain, _ = forward(alone, batch._replace(noise=None))
    terms = terms_of(vicreg_loss(both.vicreg, output, h, batch.masks, jepa.projector))
    assert terms == terms_of(vicreg_loss(alone.vicreg, plain, h, batch.masks, plain_jepa.projector))
    swapped = output._replace(clean=output.noised, noised=output.clean)
    assert terms != terms_of(vicreg_loss(both.vicreg, swapped, h, batch.masks, jepa.projector))


def test_pred_blocks_of_a_single_predictor_takes_the_noised_predictions():
    config = tiny_config("ncjepa", noise={"predictors": "single"}, vicreg={"projector": "identity"})
    batch = make_batch(config, batch=6)
    jepa, output, h = forward(config, batch)
    u = output.noised.mean(dim=1)
    views = [u[m * 6 : (m + 1) * 6] for m in range(N_BLOCKS)]
    pairs = [pair(x, y) for x, y in itertools.permutations(views, 2)]
    check(
        vicreg_loss(config.vicreg, output, h, batch.masks, jepa.projector),
        tuple(sum(terms) / len(pairs) for terms in zip(*pairs, strict=True)),
    )


# Context against target


class Scaled(nn.Module):
    """A projector that a loop can follow and whose two uses can be told apart by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + x**2


def context_case(counts: tuple[int, ...] | None) -> tuple[Config, Batch]:
    config = tiny_config("cjepa", vicreg={"on": "context_vs_target"})
    batch = make_batch(config, batch=6)
    if counts is not None:
        own = torch.tensor(counts)
        place = torch.arange(batch.masks.context_idx.shape[1])
        masks = batch.masks._replace(
            context_idx=batch.masks.context_idx.where(place < own[:, None], 0),
            context_lengths=Lengths(counts, own),
        )
        batch = batch._replace(masks=masks)
    return config, batch


@pytest.mark.parametrize("counts", [None, (10, 3, 7, 10, 1, 4)], ids=["dense", "ragged"])
def test_context_vs_target_is_the_loop(counts: tuple[int, ...] | None):
    """inv of context and target means; variance and covariance of the context's, each once."""
    config, batch = context_case(counts)
    _, output, h = forward(config, batch)
    projector = Scaled()
    h.requires_grad_()
    losses = vicreg_loss(config.vicreg, output, h, batch.masks, projector)

    kept = counts or (output.context.shape[1],) * 6
    means = [sum(output.context[b, t] for t in range(n)) / n for b, n in enumerate(kept)]
    context = torch.stack([projector(mean) for mean in means])
    whole = [sum(h[b, i] for i in range(36)) / 36 for b in range(6)]
    target = torch.stack([projector(mean) for mean in whole]).detach()
    inv = sum((context[b, d] - target[b, d]) ** 2 for b in range(6) for d in range(32)) / (6 * 32)
    expected = inv, variance(context), covariance(context)
    check(losses, expected)

    inputs = [output.context, projector.weight]
    got, weight = torch.autograd.grad(losses.total, inputs, retain_graph=True)
    loop = 25 * expected[0] + 25 * expected[1] + expected[2]
    right, right_weight = torch.autograd.grad(loop, inputs, retain_graph=True)
    assert (weight - right_weight).norm() <= 1e-3 * right_weight.norm()
    own = torch.arange(got.shape[1]) < torch.tensor(kept)[:, None]
    assert (got[own] - right[own]).norm() <= 1e-3 * right.norm()  # the rest ends in the encoder
    losses.total.backward()
    assert h.grad is None


def test_context_vs_target_reaches_no_predictor():
    config, batch = context_case(None)
    jepa, output, h = forward(config, batch)
    vicreg_loss(config.vicreg, output, h, batch.masks, jepa.projector).total.backward()
    assert all(p.grad is None for p in jepa.predictor.parameters())
    assert all(p.grad is not None for p in jepa.encoder.parameters() if p.requires_grad)
    assert jepa.projector[0].weight.grad.norm() > 0


# The sum


@pytest.mark.parametrize("on", ["pred_blocks", "context_vs_target"])
def test_total_adds_every_term_with_its_weight(on: str):
    vicreg = {"on": on, "weight": 0.01, "sim": 2.0, "std": 3.0, "cov": 4.0}
    noise = {"weight": 0.3, "consistency": 0.7}
    config = tiny_config("ncjepa", noise=noise, vicreg=vicreg)
    batch = make_batch(config)
    jepa, output, h = forward(config, batch)
    losses = objective(config, output, h, batch.masks, jepa.projector)
    m = {name: value.item() for name, value in losses.metrics.items()}
    regulariser = 2 * m["vicreg_inv"] + 3 * m["vicreg_std"] + 4 * m["vicreg_cov"]
    prediction = m["loss_clean"] + 0.3 * m["loss_noise"] + 0.7 * m["loss_consistency"]
    assert m["loss"] == pytest.approx(prediction + 0.01 * regulariser, rel=1e-5)


@pytest.mark.parametrize("on", ["pred_blocks", "context_vs_target"])
def test_statistics_are_fp32_under_autocast(on: str):
    config = tiny_config("cjepa", vicreg={"on": on, "projector": "identity"})
    batch = make_batch(config, batch=6)
    jepa, output, h = forward(config, batch)
    exact = vicreg_loss(config.vicreg, output, h, batch.masks, jepa.projector)
    with torch.autocast("cpu", torch.bfloat16):
        cast = vicreg_loss(config.vicreg, output, h, batch.masks, jepa.projector)
    assert cast.total.dtype == torch.float32
    torch.testing.assert_close(cast.total, exact.total, rtol=1e-6, atol=0)
