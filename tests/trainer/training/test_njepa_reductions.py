"""What N-JEPA becomes without a weight, a consistency or noise, and the noise that it draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bench.published.networks import PublishedEncoder, PublishedPredictor, published_loss
from njepa.config import Config
from njepa.training.module import TrainModule, param_groups
from tests.support.noised_steps import NATIVE, NOISES, WAYS, build, enlarge, features, target_of
from tests.support.tiny import N_BLOCKS, N_CONTEXT, N_TARGETS, SIDE, normalised, tiny_config


def module_of(config: Config) -> TrainModule:
    module = TrainModule(config)
    enlarge(module)
    return module


def test_without_weights_it_is_published_ijepa() -> None:
    """lambda1 = lambda2 = 0: bit for bit the module of method=ijepa, over updates; no noise."""
    config, _ = build("reference", weight=0.0, consistency=0.0)
    plain = tiny_config("ijepa", impl={"default": "reference"}, run={"seed": 9})
    modules = [TrainModule(config), TrainModule(plain)]
    assert modules[0].jepa.noise_predictor is None
    assert list(modules[0].state_dict()) == list(modules[1].state_dict())
    assert not any("noise" in name for name in modules[0].state_dict())
    for module in modules:
        enlarge(module)
    optimizers = [torch.optim.AdamW(param_groups(module, 0.04), lr=1e-3) for module in modules]
    encoder = PublishedEncoder(SIDE, patch=8, width=32, depth=2, heads=2)
    predictor = PublishedPredictor(SIDE, encoder_width=32, width=24, depth=2, heads=2)
    for step in range(3):
        _, batch = build("reference", step=step, weight=0.0, consistency=0.0)
        assert batch.noise is None
        encoder.load_state_dict(modules[0].jepa.encoder.state_dict())
        predictor.load_state_dict(modules[0].jepa.predictor.state_dict())
        target = {name: p.detach().clone() for name, p in encoder.named_parameters()}
        losses = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            loss, metrics = module(batch, features(module, target, batch))
            assert set(metrics) == {"loss", "loss_clean"}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert torch.equal(losses[0], losses[1])
        for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        published = published_loss(
            encoder, predictor, encoder, normalised(batch.images, config),
            [batch.masks.context_idx], list(batch.masks.target_idx.unbind(1)),
        )  # fmt: skip
        assert losses[0].item() == pytest.approx(published.item(), rel=1e-6)


def test_noise_moves_no_other_weight() -> None:
    modules = [TrainModule(build("reference", weight=w, consistency=w)[0]) for w in (0.0, 0.1)]
    for part in ("encoder", "predictor"):
        without, with_noise = (getattr(module.jepa, part).state_dict() for module in modules)
        assert without.keys() == with_noise.keys()
        assert all(torch.equal(without[name], with_noise[name]) for name in without)


@pytest.mark.parametrize("predictors", ["unshared", "shared"])
def test_without_consistency_it_is_the_sum_of_two_branches(predictors: str) -> None:
    config, batch = build("reference", weight=0.7, consistency=0.0, predictors=predictors)
    module = module_of(config)
    h = features(module, target_of(module), batch)
    loss, _ = module(batch, h)
    loss.backward()
    got = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad()
    output = module.jepa(batch.images, batch.masks, batch.noise)
    y = torch.nn.functional.layer_norm(h, (h.shape[-1],))
    rows = torch.cat([gathered(y, idx) for idx in batch.masks.target_idx.unbind(1)])
    assert output.clean is not None
    assert output.noised is not None
    smooth_l1 = torch.nn.functional.smooth_l1_loss
    branches = smooth_l1(output.clean, rows) + 0.7 * smooth_l1(output.noised, rows)
    branches.backward()
    assert torch.equal(loss, branches)
    for name, p in module.named_parameters():
        if p.requires_grad:
            assert torch.equal(got[name], p.grad), name


def gathered(y: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return torch.stack([features[rows] for features, rows in zip(y, idx, strict=True)])


@pytest.mark.parametrize(("impl", "dtype"), [way.values[:2] for way in WAYS])
@pytest.mark.parametrize("draw", ["per_block", "shared"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_shared_and_without_noise_both_predictions_are_one(
    impl: str, dtype: torch.dtype, draw: str, batch: int
) -> None:
    if impl == "native" and NATIVE != "yes":
        pytest.skip(NATIVE)
    config, made = build(
        impl, batch, sigma=0.0, draw=draw, predictors="shared", mask_token="shared"
    )  # fmt: skip
    module = module_of(config).to(dtype)
    entering: list[torch.Tensor] = []
    module.jepa.predictor.predictor_blocks[0].register_forward_pre_hook(
        lambda _, inputs: entering.append(inputs[0])
    )
    _, metrics = module(made, features(module, target_of(module), made))
    (both,) = entering
    assert torch.equal(*both.chunk(2))
    # Equal rows of one product may still differ by a rounding: a BLAS sums the last rows of a
    # matrix in another order (MKL does, in double precision with AVX-512).
    eps = torch.finfo(dtype).eps
    clean, noised = metrics["loss_clean"].item(), metrics["loss_noise"].item()
    assert metrics["loss_consistency"].item() <= (8 * eps) ** 2
    assert noised == pytest.approx(clean, rel=8 * eps)
    assert clean > 0


def noise_in_the_step(draw: str, sigma: Any, batch: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma n [M, B, Kt, d] of a step in which all blocks of an image have the same patches.

    Taken from what enters the first block of the noised predictor.
    """
    config, made = build("auto", batch, sigma=sigma, draw=draw)
    same = made.masks.target_idx[:, :1].expand(-1, N_BLOCKS, -1).contiguous()
    made = made._replace(masks=made.masks._replace(target_idx=same))
    module = TrainModule(config)
    predictor = module.jepa.noise_predictor
    assert predictor is not None
    seen: list[torch.Tensor] = []
    hook = predictor.predictor_blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    with torch.no_grad():
        module(made, features(module, target_of(module), made))
    hook.remove()
    tokens = seen[0].view(N_BLOCKS, batch, N_CONTEXT + N_TARGETS, -1)[:, :, N_CONTEXT:]
    psi = predictor.predictor_pos_embed[0, made.masks.target_idx].transpose(0, 1)
    assert made.noise is not None
    return (tokens - psi - predictor.mask_token).detach(), made.noise.sigma


@pytest.mark.parametrize(("sigma", "draw"), NOISES, ids=lambda value: str(value))
def test_statistics_of_the_noise(sigma: Any, draw: str) -> None:
    """Standard deviation, distribution, independence; bounds are four standard errors."""
    noise, sigmas = noise_in_the_step(draw, sigma)
    scale = sigmas.t()[:, :, None, None]
    assert (noise[(scale == 0).expand_as(noise)].abs() < 1e-6).all()
    if draw == "shared":
        # Subtracting psi and the mask token again leaves the same rounding in every block.
        assert all(torch.equal(noise[0], block) for block in noise[1:])
        noise, scale = noise[:1], scale[:1]
    n = (noise / scale)[(scale > 0).expand_as(noise)].double()
    assert n.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(2 * len(n)))
    assert n.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(len(n)))
    assert stats.kstest(n.numpy(), "norm").pvalue > 1e-3
    if isinstance(sigma, float):
        assert noise.std().item() == pytest.approx(sigma, abs=4 * sigma / math.sqrt(2 * len(n)))
        # Between blocks, images, patches and channels: every pair of each axis.
        for axis in range(4):
            rows = noise.movedim(axis, 0).flatten(1)
            if len(rows) > 1:
                pairs = np.corrcoef(rows.numpy())[np.triu_indices(len(rows), 1)]
                # The largest of this many correlations, each with deviation 1/sqrt(n).
                bound = stats.norm.isf(1e-4 / len(pairs)) / math.sqrt(rows.shape[1])
                assert np.abs(pairs).max() < bound, axis
    elif sigma == "edm" and draw == "shared":
        assert (sigmas == sigmas[:, :1]).all()
