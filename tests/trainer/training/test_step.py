"""The trained module: reductions to I-JEPA bit for bit, parameter groups, several ranks."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from njepa.config import Config
from njepa.data.batch import Batch
from njepa.models.projector import DistributedBatchNorm
from njepa.training.ema import make_target
from njepa.training.engine import PlainEngine
from njepa.training.module import TrainModule, param_groups
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, training_step
from tests.support.tiny import make_batch, rows_of, tiny_config

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


# several ranks

RANK_CASES = {
    "ijepa": {"method": "ijepa"},
    "cjepa": {"method": "cjepa"},
    "njepa": {"method": "njepa"},
    "ncjepa": {"method": "ncjepa", "noise": {"predictors": "unshared"}},
    "shared-draw": {"method": "njepa", "noise": {"draw": "shared"}},
    "shared-predictors": {"method": "ncjepa", "noise": {"predictors": "shared"}},
    "shared-token": {"method": "njepa", "noise": {"mask_token": "shared"}},
    "single": {"method": "njepa", "noise": {"predictors": "single"}},
    "context_vs_target": {
        "method": "cjepa",
        "vicreg": {"on": "context_vs_target", "weight": 0.1, "projector": (16, 24)},
    },
}
WORLD, GLOBAL = 2, 8


def one_case(options: dict, rank: int, world: int, group: dist.ProcessGroup | None) -> dict:
    """Loss, metrics, gradients and buffers of one rank's share of a global batch."""
    config = tiny_config(**options)
    batch = make_batch(config, batch=GLOBAL)
    own = slice(rank * GLOBAL // world, (rank + 1) * GLOBAL // world)
    batch = rows_of(batch, own)
    module = TrainModule(config, group)
    loss, metrics = module(batch, features(module, batch))
    loss.backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    return {"metrics": metrics, "grads": grads, "buffers": dict(module.named_buffers())}


def norm_case(rank: int, world: int, group: dist.ProcessGroup | None) -> dict:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(GLOBAL, 5, generator=generator) * 3 + 100
    weight = torch.randn(GLOBAL, 5, generator=generator)
    own = slice(rank * GLOBAL // world, (rank + 1) * GLOBAL // world)
    norm = DistributedBatchNorm(5, group)
    x = x[own].requires_grad_()
    y = norm(x)
    (y.square() * weight[own]).mean().backward()
    return {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "mean": norm.running_mean,
            "var": norm.running_var}  # fmt: skip


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=WORLD)  # fmt: skip
    group = dist.group.WORLD
    results = {name: one_case(case, rank, WORLD, group) for name, case in RANK_CASES.items()}
    results["norm"] = norm_case(rank, WORLD, group)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.multirank
@pytest.mark.parametrize("name", RANK_CASES)
def test_two_ranks_equal_one_with_the_doubled_batch(two_ranks: list[dict], name: str):
    ranks = [result[name] for result in two_ranks]
    alone = one_case(RANK_CASES[name], 0, 1, None)
    for key, value in alone["metrics"].items():
        got = sum(rank["metrics"][key] for rank in ranks) / WORLD
        torch.testing.assert_close(
            got, value, rtol=2e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}"
        )
    scale = max(grad.norm() for grad in alone["grads"].values())
    for key, value in alone["grads"].items():
        got = sum(rank["grads"][key] for rank in ranks) / WORLD
        assert (got - value).norm() <= 1e-4 * value.norm() + 1e-7 * scale, key
    for key, value in alone["buffers"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["buffers"][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.multirank
def test_distributed_batch_norm(two_ranks: list[dict]):
    ranks = [result["norm"] for result in two_ranks]
    alone = norm_case(0, 1, None)
    torch.testing.assert_close(torch.cat([r["y"] for r in ranks]), alone["y"], rtol=0, atol=1e-4)
    # Each rank's loss is a mean over its half: the gradient to inputs is twice the global one.
    torch.testing.assert_close(
        torch.cat([r["dx"] for r in ranks]) / WORLD, alone["dx"], rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(sum(r["dw"] for r in ranks) / WORLD, alone["dw"])
    for rank in ranks:
        torch.testing.assert_close(rank["mean"], alone["mean"])
        torch.testing.assert_close(rank["var"], alone["var"], rtol=1e-4, atol=0)


def test_batch_norm_of_one_process_is_torchs():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 5, generator=generator) * 3 + 10
    ours, theirs = DistributedBatchNorm(5), torch.nn.BatchNorm1d(5)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.arange(5) + 0.5)
            norm.bias.copy_(torch.arange(5) - 2.0)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [norm(i) for norm, i in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        (output.sin() * torch.arange(5)).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=lambda m, n=name: f"{n} {m}")
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
