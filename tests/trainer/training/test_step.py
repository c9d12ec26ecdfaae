"""The trained module: reductions to I-JEPA bit for bit, metrics, parameter groups."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch

from njepa.config import Config
from njepa.data.batch import Batch
from njepa.training.ema import make_target
from njepa.training.engine import PlainEngine
from njepa.training.module import TrainModule, param_groups
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, training_step
from tests.support.tiny import make_batch, tiny_config

RATES = Rates(lr=2e-3, weight_decay=0.05, momentum=0.95)
OFF = {"weight": 0.0, "consistency": 0.0}
SINGLE = {"predictors": "single", "sigma": 0.0}
TIED = {"predictors": "shared", "mask_token": "shared"}


def features(module: TrainModule, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return make_target(module.jepa.encoder)(batch.images)


def batch_of(config: Config, batch: int = 4, step: int = 0) -> Batch:
    """With the number of the configuration as sigma of every block."""
    assert isinstance(config.noise.sigma, float)
    return make_batch(config, batch, step, sigmas=(config.noise.sigma,))


@functools.cache
def trajectory(config: Config, steps: int = 10) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of ``steps`` fp32 updates with AdamW and EMA, and the final weights."""
    module = TrainModule(config)
    target = make_target(module.jepa.encoder)
    state = TrainState(PlainEngine(module, config.optim, torch.device("cpu")), target)
    losses = []
    for step in range(steps):
        (seen,) = training_step(state, [batch_of(config, step=step)], RATES).micro_batches
        losses.append(seen.metrics["loss"].item())
    weights = {f"target.{name}": value for name, value in target.state_dict().items()}
    return losses, {**weights, **module.state_dict()}


@pytest.mark.parametrize(
    "reduced",
    [
        tiny_config("njepa", noise=OFF),
        tiny_config("njepa", noise={**OFF, "predictors": "shared"}),
        tiny_config("njepa", noise={**OFF, "predictors": "single"}),
        tiny_config("njepa", noise=SINGLE),
        tiny_config("njepa", noise={**SINGLE, "weight": 2.0, "draw": "shared"}),
        tiny_config("cjepa", vicreg={"weight": 0.0}),
        tiny_config("ncjepa", noise=OFF, vicreg={"weight": 0.0}),
    ],
    ids=["off", "off-shared", "off-single", "sigma0", "sigma0-weight", "beta0", "both0"],
)
def test_ten_steps_equal_ijepa_bit_for_bit(reduced: Config):
    losses, weights = trajectory(tiny_config("ijepa"))
    other_losses, other_weights = trajectory(reduced)
    assert losses == other_losses
    assert weights.keys() == other_weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name
    assert losses[-1] < losses[0]


def test_noise_and_vicreg_do_change_the_training():
    plain, _ = trajectory(tiny_config("ijepa"))
    configs = [
        tiny_config("njepa"),
        tiny_config("njepa", noise={"predictors": "single"}),
        tiny_config("njepa", noise={"weight": 0.0}),
        tiny_config("njepa", noise={"consistency": 0.0}),
        tiny_config("njepa", noise={"draw": "shared"}),
        tiny_config("cjepa"),
        tiny_config("cjepa", vicreg={"on": "context_vs_target"}),
    ]
    assert len({losses[-1] for losses in (plain, *(trajectory(c)[0] for c in configs))}) == 8


def gradients(module: TrainModule, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module.zero_grad()
    loss, _ = module(batch, features(module, batch))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}
    return loss.detach(), grads


@pytest.mark.parametrize("predictors", ["unshared", "shared"])
def test_without_consistency_the_loss_is_that_of_two_branches(predictors: str):
    """Both predictions as one network each would make them, and no other term: 10 steps."""
    weight = 0.3
    noise = {"predictors": predictors, "weight": weight, "consistency": 0.0}
    if predictors == "shared":
        noise["mask_token"] = "shared"
    config = tiny_config("njepa", noise=noise)
    module, twin = TrainModule(config), TrainModule(config)
    optimizer = torch.optim.AdamW(param_groups(module, 0.05), lr=2e-3)
    clean, noised = (
        TrainModule(tiny_config(method, **more))
        for method, more in (("ijepa", {}), ("njepa", {"noise": {"predictors": "single"}}))
    )
    # Each branch as a network of its own, on modules that the twin shares with it.
    clean.jepa.encoder = noised.jepa.encoder = twin.jepa.encoder
    clean.jepa.predictor = noised.jepa.predictor = twin.jepa.predictor
    if predictors == "unshared":
        noised.jepa.predictor = twin.jepa.noise_predictor
    for step in range(10):
        twin.load_state_dict(module.state_dict())
        batch = batch_of(config, step=step)
        h = features(twin, batch)
        plain = batch._replace(noise=None)
        expected = clean(plain, h)[0] + weight * noised(batch, h)[0]
        loss, _ = module(batch, h)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6), step
        twin.zero_grad()
        optimizer.zero_grad()
        expected.backward()
        loss.backward()
        for (name, got), want in zip(module.named_parameters(), twin.parameters(), strict=True):
            if want.grad is not None:
                error = (got.grad - want.grad).norm()
                assert error <= 1e-5 * want.grad.norm() + 1e-9, (step, name)
        optimizer.step()


@pytest.mark.parametrize("weight", [0.1, 0.6])
def test_a_shared_predictor_at_sigma_zero_has_nothing_to_be_consistent_about(weight: float):
    """L_CN is 0 exactly and L = (1 + lambda1) L_CT, in value and in every gradient."""
    noise = {**TIED, "sigma": 0.0, "weight": weight, "consistency": 5.0}
    plain = TrainModule(tiny_config("ijepa"))
    module = TrainModule(tiny_config("njepa", noise=noise))
    batch = batch_of(module.config)
    loss, metrics = module(batch, features(module, batch))
    assert metrics["loss_consistency"].item() == 0.0
    assert torch.equal(metrics["loss_noise"], metrics["loss_clean"])
    assert loss.item() == pytest.approx((1 + weight) * metrics["loss_clean"].item(), rel=1e-6)
    _, got = gradients(module, batch)
    _, expected = gradients(plain, batch._replace(noise=None))
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert (got[name] - (1 + weight) * grad).norm() <= 1e-5 * (1 + weight) * grad.norm(), name


def test_noise_or_a_second_mask_token_gives_something_to_be_consistent_about():
    for noise in ({**TIED, "sigma": 0.5}, {"predictors": "shared", "sigma": 0.0}, {"sigma": 0.0}):
        module = TrainModule(tiny_config("njepa", noise=noise))
        batch = batch_of(module.config)
        assert module(batch, features(module, batch))[1]["loss_consistency"] > 1e-6


def test_two_equal_predictors_at_sigma_zero_share_the_gradient_of_one():
    weight = 0.6
    config = tiny_config("njepa", noise={"sigma": 0.0, "weight": weight})
    plain, two = TrainModule(tiny_config("ijepa")), TrainModule(config)
    two.jepa.noise_predictor.load_state_dict(two.jepa.predictor.state_dict())
    batch = batch_of(config)
    _, got = gradients(two, batch)
    _, expected = gradients(plain, batch._replace(noise=None))
    for name, grad in expected.items():
        mine = got[name]
        if "predictor" in name:
            mine = mine + got[name.replace("jepa.", "jepa.noise_")]
        assert (mine - (1 + weight) * grad).norm() <= 1e-5 * (1 + weight) * grad.norm(), name


@pytest.mark.parametrize("method", ["ijepa", "cjepa", "njepa", "ncjepa"])
def test_metrics_and_gradients(method: str):
    config = tiny_config(method)
    module, batch = TrainModule(config), make_batch(config)
    state = torch.get_rng_state()
    loss, metrics = module(batch, features(module, batch))
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    expected = {"loss", "loss_clean"}
    if method in ("njepa", "ncjepa"):
        expected |= {"loss_noise", "loss_consistency"}
    if method in ("cjepa", "ncjepa"):
        expected |= {"vicreg_inv", "vicreg_std", "vicreg_cov"}
    assert metrics.keys() == expected
    for value in metrics.values():
        assert value.shape == ()
        assert not value.requires_grad
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ncjepa"},
        {"method": "ncjepa", "noise": {"predictors": "shared", "consistency_stop": "clean"}},
        {"method": "ncjepa", "noise": {"predictors": "single", "draw": "shared"}},
        {"method": "njepa", "noise": {"space": "encoder_tied", "mask_token": "shared"}},
        {"method": "cjepa", "vicreg": {"on": "context_vs_target"}},
        {
            "method": "ncjepa",
            "noise": TIED,
            "model": {"predictor": {"width": 24, "heads": 2, "context": "shared"}},
        },
    ],
    ids=["default", "shared", "single", "encoder_tied", "context_vs_target", "shared-context"],
)
def test_no_value_is_read_on_the_host(options: dict, monkeypatch: pytest.MonkeyPatch):
    """Meta tensors have no values: .item(), or a branch or a shape that depends on one, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    config = tiny_config(**options)
    module, batch = TrainModule(config).to("meta"), make_batch(config).to("meta")
    loss, metrics = module(batch, torch.empty(4, 36, 32, device="meta"))
    loss.backward()
    assert {value.device.type for value in (loss, *metrics.values())} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


MASK_TOKENS = {
    "two-predictors": ({}, {"predictor.mask_token", "noise_predictor.mask_token"}),
    "tied": ({"mask_token": "shared"}, {"predictor.mask_token"}),
    "one-predictor": (
        {"predictors": "shared"}, {"predictor.mask_token", "predictor.noise_mask_token"},
    ),
    "one-and-tied": (TIED, {"predictor.mask_token"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MASK_TOKENS)
def test_parameter_groups(name: str):
    noise, mask_tokens = MASK_TOKENS[name]
    module = TrainModule(tiny_config("ncjepa", noise={"predictors": "unshared", **noise}))
    decayed, plain = param_groups(module, 0.04)
    assert decayed["weight_decay"] == 0.04
    assert plain["weight_decay"] == 0.0
    assert decayed["decayed"]
    assert not plain["decayed"]
    params = [*decayed["params"], *plain["params"]]
    assert len(params) == len({id(p) for p in params})  # one of two modules is updated once
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    group = {names[id(p)]: g["decayed"] for g in (decayed, plain) for p in g["params"]}
    assert group.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert not any("pos_embed" in name for name in group)
    for name, is_decayed in group.items():
        is_norm = "norm" in name or name in ("jepa.projector.1.weight", "jepa.projector.4.weight")
        assert is_decayed == (not name.endswith("bias") and not is_norm), name
    assert {n.removeprefix("jepa.") for n in group if "mask_token" in n} == mask_tokens
