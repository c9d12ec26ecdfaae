"""Prediction loss per level, and VICReg on each choice of tensors, against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import N_BLOCKS, SIGMAS, make_batch, tiny_config
from torch.nn import functional as F

from njepa.config import Config
from njepa.data.batch import Batch
from njepa.ema import make_target
from njepa.models.jepa import Jepa, JepaOutput, build_jepa
from njepa.noise import NoiseLevels
from njepa.objectives import (
    level_weight,
    loss_per_level,
    objective,
    prediction_loss,
    vicreg_loss,
)


def forward(config: Config, batch: Batch) -> tuple[Jepa, JepaOutput, torch.Tensor]:
    jepa = build_jepa(config)
    with torch.no_grad():
        h = make_target(jepa.encoder)(batch.images)
    output = jepa(batch.images, batch.context_idx, batch.target_idx, batch.sigma,
                  batch.sample_ids, batch.micro_step)  # fmt: skip
    return jepa, output, h


def targets(h: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """[B, M, Kt, D] layer-normed targets, by loops."""
    normal = F.layer_norm(h, h.shape[-1:])
    return torch.stack([torch.stack([normal[b, i] for i in idx[b]]) for b in range(len(h))])


def by_image(rows: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """[L*B, Kt, D] -> [B, L, Kt, D]."""
    batch, blocks, _ = idx.shape
    return torch.stack(
        [torch.stack([rows[m * batch + b] for m in range(blocks)]) for b in range(batch)]
    )


def test_ijepa_loss():
    config = tiny_config("ijepa")
    batch = make_batch(config)
    _, output, h = forward(config, batch)
    expected = F.smooth_l1_loss(
        by_image(output.clean, batch.target_idx), targets(h, batch.target_idx)
    )
    losses = objective(config, output, h, batch)
    torch.testing.assert_close(losses.total, expected)
    assert losses.metrics.keys() == {"loss", "loss_clean"}
    assert torch.equal(losses.metrics["loss"], losses.total.detach())


@pytest.mark.parametrize("level_map", ["per_block", "per_token", "per_sample", "per_batch", "all"])
@pytest.mark.parametrize("weights", ["uniform", "inv", "edm", (0.5, 1.0, 2.0, 0.0)])
@pytest.mark.parametrize(("normalise", "scale"), [(False, 1.0), (True, 1 / 1.7)])
def test_njepa_loss(level_map: str, weights: object, normalise: bool, scale: float):
    noise = {"map": level_map, "level_weights": weights, "weight": 0.7, "normalise": normalise}
    config = tiny_config("njepa", noise=noise)
    batch = make_batch(config)
    _, output, h = forward(config, batch)
    clean = F.smooth_l1_loss(by_image(output.clean, batch.target_idx), targets(h, batch.target_idx))
    per_token = F.smooth_l1_loss(
        by_image(output.noised, output.noised_idx), targets(h, output.noised_idx), reduction="none"
    ).mean(-1)
    w = {
        "uniform": [1.0] * 4,
        "inv": [1 / (1 + 2 * s**2) for s in SIGMAS],
        "edm": [min(10.0, (s**2 + 0.5) / (0.5 * s**2)) for s in SIGMAS],
        (0.5, 1.0, 2.0, 0.0): [0.5, 1.0, 2.0, 0.0],
    }[weights]
    per_level, total = {k: [] for k in range(4)}, 0.0
    for b, m, t in itertools.product(*map(range, per_token.shape)):
        level = int(batch.levels[b, m] if batch.levels.dim() == 2 else batch.levels[b, m, t])
        per_level[level].append(per_token[b, m, t].item())
        total += w[level] * per_token[b, m, t].item() / per_token.numel()

    losses = prediction_loss(config, output, h, batch)
    assert losses.metrics["loss_clean"].item() == pytest.approx(clean.item(), rel=1e-5)
    assert losses.metrics["loss_noise"].item() == pytest.approx(total, rel=1e-5)
    assert losses.total.item() == pytest.approx((clean.item() + 0.7 * total) * scale, rel=1e-5)
    for level, values in per_level.items():
        got = losses.metrics[f"loss_level_{level}"].item()
        if values:
            assert got == pytest.approx(sum(values) / len(values), rel=1e-5)
        else:
            assert got != got
    if level_map in ("per_block", "all"):  # every level equally often: the sum over k as written
        mean = sum(w[k] * sum(v) / len(v) for k, v in per_level.items()) / 4
        assert losses.metrics["loss_noise"].item() == pytest.approx(mean, rel=1e-5)


def test_one_predictor_has_no_clean_loss_and_no_lambda():
    config = tiny_config("njepa", noise={"predictors": 1, "weight": 0.3, "normalise": True})
    batch = make_batch(config)
    _, output, h = forward(config, batch)
    losses = prediction_loss(config, output, h, batch)
    assert "loss_clean" not in losses.metrics
    assert torch.equal(losses.total.detach(), losses.metrics["loss_noise"])


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("inv", [1 / (1 + s**2 / 0.5) for s in (0.0, 0.1, 0.5, 2.0)]),
        ("edm", [10.0, 10.0, (0.25 + 0.5) / (0.25 * 0.5), (4 + 0.5) / (4 * 0.5)]),
        ((1.0, 2.0, 0.0, 4.0), [1.0, 2.0, 0.0, 4.0]),
    ],
    ids=["inv", "edm", "list"],
)
def test_level_weight(weights: object, expected: list[float]):
    levels, sigma = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.0, 0.1], [0.5, 2.0]])
    noise = tiny_config("njepa", noise={"level_weights": weights}).noise
    got = level_weight(noise, levels, sigma)
    torch.testing.assert_close(got, torch.tensor(expected).view(2, 2))
    per_token = level_weight(noise, levels[..., None], sigma[..., None])
    assert torch.equal(per_token, got[..., None])


def test_no_level_weight_is_one_everywhere():
    noise = tiny_config("njepa").noise
    assert level_weight(noise, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)) is None


def test_level_weight_follows_the_annealed_sigma():
    noise = tiny_config("njepa", noise={"level_weights": "inv", "anneal_to": 0.1}).noise
    table = NoiseLevels(noise, N_BLOCKS, pos_rms=0.7, seed=0, total_steps=11)
    levels, sigma = map(torch.tensor, table.assign(10, np.arange(5), 3))
    expected = torch.tensor([1 / (1 + 2 * (0.1 * s) ** 2) for s in (2.0, 0.71567, 0.21500, 0.05)])
    torch.testing.assert_close(
        level_weight(noise, levels, sigma), expected[levels], rtol=1e-4, atol=0
    )


def test_loss_per_level_of_an_absent_level_is_nan():
    per_token = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    got = loss_per_level(per_token, torch.tensor([[2, 2]]), 3)
    torch.testing.assert_close(got, torch.tensor([torch.nan, torch.nan, 4.0]), equal_nan=True)


# ---------------------------------------------------------------------------------------- VICReg


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


def terms_of(losses) -> tuple[torch.Tensor, ...]:
    return tuple(losses.metrics[f"vicreg_{name}"] for name in ("inv", "std", "cov"))


def check(losses, expected: tuple[torch.Tensor, ...]) -> None:
    for got, want in zip(terms_of(losses), expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-6)
    total = 25 * expected[0] + 25 * expected[1] + expected[2]
    torch.testing.assert_close(losses.total.detach(), total.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("projector", [None, "identity", (16, 48)])
def test_pred_blocks_is_the_loop_over_ordered_pairs(projector: object):
    config = tiny_config("cjepa", vicreg={"projector": projector})
    batch = make_batch(config, batch=6)
    jepa, output, h = forward(config, batch)
    losses = vicreg_loss(config, output, h, batch, jepa.projector)
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


def test_pred_vs_target_trains_the_predictions_only():
    config = tiny_config("cjepa", vicreg={"on": "pred_vs_target", "projector": "identity"})
    batch = make_batch(config, batch=6)
    jepa, output, h = forward(config, batch)
    h.requires_grad_()
    losses = vicreg_loss(config, output, h, batch, jepa.projector)
    u = output.clean.mean(dim=1)
    t = targets(h, batch.target_idx).mean(dim=2).transpose(0, 1).flatten(0, 1)
    expected = pair(u, t)
    check(losses, expected)
    (got,) = torch.autograd.grad(losses.total, output.clean, retain_graph=True)
    frozen = pair(u, t.detach())
    (want,) = torch.autograd.grad(25 * frozen[0] + 25 * frozen[1] + frozen[2], output.clean)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    losses.total.backward()
    assert h.grad is None


def test_context_and_tokens_have_no_invariance():
    for on in ("context", "tokens"):
        config = tiny_config("cjepa", vicreg={"on": on, "projector": "identity"})
        batch = make_batch(config, batch=6)
        jepa, output, h = forward(config, batch)
        u = output.context.mean(dim=1) if on == "context" else output.clean.flatten(0, 1)
        assert len(u) == (6 if on == "context" else 6 * N_BLOCKS * 5)
        check(vicreg_loss(config, output, h, batch, jepa.projector), pair(u, u))
        assert terms_of(vicreg_loss(config, output, h, batch, jepa.projector))[0] == 0


def test_vicreg_takes_the_clean_predictions_where_there_are_any():
    both, alone = tiny_config("ncjepa"), tiny_config("cjepa")
    batch = make_batch(both)
    jepa, output, h = forward(both, batch)
    plain_jepa, plain, _ = forward(alone, batch._replace(sigma=None, levels=None))
    assert terms_of(vicreg_loss(both, output, h, batch, jepa.projector)) == terms_of(
        vicreg_loss(alone, plain, h, batch, plain_jepa.projector)
    )


def test_vicreg_of_one_predictor_at_all_levels_has_levels_times_blocks_views():
    config = tiny_config(
        "ncjepa", noise={"predictors": 1, "map": "all"}, vicreg={"projector": "identity"}
    )
    batch = make_batch(config, batch=6)
    jepa, output, h = forward(config, batch)
    u = output.noised.mean(dim=1)
    views = [u[m * 6 : (m + 1) * 6] for m in range(4 * N_BLOCKS)]
    pairs = [pair(x, y) for x, y in itertools.permutations(views, 2)]
    check(
        vicreg_loss(config, output, h, batch, jepa.projector),
        tuple(sum(terms) / len(pairs) for terms in zip(*pairs, strict=True)),
    )


def test_total_adds_vicreg_with_its_weight():
    config = tiny_config("ncjepa", vicreg={"weight": 0.01, "sim": 2.0, "std": 3.0, "cov": 4.0})
    batch = make_batch(config)
    jepa, output, h = forward(config, batch)
    losses = objective(config, output, h, batch, jepa.projector)
    m = {name: value.item() for name, value in losses.metrics.items()}
    regulariser = 2 * m["vicreg_inv"] + 3 * m["vicreg_std"] + 4 * m["vicreg_cov"]
    expected = m["loss_clean"] + m["loss_noise"] + 0.01 * regulariser
    assert m["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("on", ["pred_blocks", "pred_vs_target", "context", "tokens"])
def test_statistics_are_fp32_under_autocast(on: str):
    config = tiny_config("cjepa", vicreg={"on": on, "projector": "identity"})
    batch = make_batch(config, batch=6)
    jepa, output, h = forward(config, batch)
    exact = vicreg_loss(config, output, h, batch, jepa.projector)
    with torch.autocast("cpu", torch.bfloat16):
        cast = vicreg_loss(config, output, h, batch, jepa.projector)
    assert cast.total.dtype == torch.float32
    torch.testing.assert_close(cast.total, exact.total, rtol=1e-6, atol=0)
