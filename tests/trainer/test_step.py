"""The trained module: reductions to I-JEPA bit for bit, parameter groups, several ranks."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import make_batch, normalised, tiny_config
from torch import multiprocessing

from njepa.config import Config
from njepa.data.batch import Batch
from njepa.ema import ema_parameters, make_target, update_target
from njepa.models.projector import DistributedBatchNorm
from njepa.step import TrainModule, param_groups

ZERO_LEVELS = {"schedule": "list", "sigmas": (0.0,) * 4, "predictors": 1}


def features(module: TrainModule, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return make_target(module.jepa.encoder)(batch.images)


@functools.cache
def trajectory(config: Config, steps: int = 10) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of ``steps`` fp32 updates with AdamW and EMA, and the final weights."""
    sigmas = config.noise.sigmas or (0.5,) * 4
    module = TrainModule(config)
    target = make_target(module.jepa.encoder)
    optimizer = torch.optim.AdamW(param_groups(module, 0.05), lr=2e-3)
    losses = []
    for step in range(steps):
        batch = make_batch(config, step=step, sigmas=sigmas)
        with torch.no_grad():
            h = target(batch.images)
        loss, _ = module(batch, h)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_target(target, ema_parameters(module.jepa.encoder), 0.95)
        losses.append(loss.item())
    weights = {f"target.{name}": value for name, value in target.state_dict().items()}
    return losses, {**weights, **module.state_dict()}


@pytest.mark.parametrize(
    "reduced",
    [
        tiny_config("njepa", noise={"weight": 0.0}),
        tiny_config("njepa", noise={"weight": 0.0, "predictors": 1, "map": "all"}),
        tiny_config("njepa", noise=ZERO_LEVELS),
        tiny_config("njepa", noise={**ZERO_LEVELS, "mix": "vp", "weight": 0.5, "normalise": True}),
        tiny_config("njepa", noise={**ZERO_LEVELS, "mix": "edm", "map": "per_token"}),
        tiny_config("cjepa", vicreg={"weight": 0.0}),
        tiny_config("ncjepa", noise={"weight": 0.0}, vicreg={"weight": 0.0}),
    ],
    ids=["lambda0", "lambda0-all", "sigma0", "sigma0-vp", "sigma0-edm", "beta0", "both0"],
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
    for config in (tiny_config("njepa", noise={"predictors": 1}), tiny_config("cjepa")):
        assert trajectory(config)[0][-1] != plain[-1]


def test_all_levels_at_sigma_zero_equal_ijepa_up_to_rounding():
    losses, _ = trajectory(tiny_config("ijepa"), 1)
    other, _ = trajectory(tiny_config("njepa", noise={**ZERO_LEVELS, "map": "all"}), 1)
    assert other == pytest.approx(losses, rel=1e-6)
    plain, repeated = (
        TrainModule(tiny_config("ijepa")),
        TrainModule(tiny_config("njepa", noise={**ZERO_LEVELS, "map": "all"})),
    )
    for module in (plain, repeated):
        batch = make_batch(module.config, sigmas=(0.0,) * 4)
        module(batch, features(module, batch))[0].backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            other_grad = repeated.get_parameter(name).grad
            assert (parameter.grad - other_grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("method", ["ijepa", "ncjepa"])
def test_bytes_train_as_normalised_images_did(method: str):
    """Losses and gradients of patchify and a linear layer on the kept patches against those of
    normalised images, the convolution of all patches and a gather."""
    config = tiny_config(method)
    module, batch = TrainModule(config), make_batch(config)
    target = make_target(module.jepa.encoder)
    values = []
    for images in (batch.images, normalised(batch.images, config)):
        module.zero_grad()
        loss, _ = module(batch._replace(images=images), target(images))
        loss.backward()
        values.append([loss.detach(), *(p.grad for p in module.parameters() if p.requires_grad)])
    for ours, before in zip(*values, strict=True):
        assert (ours - before).norm() <= 1e-5 * before.norm()


def test_two_tied_predictors_at_sigma_zero_equal_ijepa_when_normalised():
    config = tiny_config("njepa", noise={**ZERO_LEVELS, "predictors": 2, "normalise": True,
                                         "weight": 0.6})  # fmt: skip
    plain, tied = TrainModule(tiny_config("ijepa")), TrainModule(config)
    tied.jepa.noise_predictor.load_state_dict(tied.jepa.predictor.state_dict())
    for module in (plain, tied):
        batch = make_batch(module.config, sigmas=(0.0,) * 4)
        module(batch, features(module, batch))[0].backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            got = tied.get_parameter(name).grad
            if "predictor" in name:  # two copies share what one gets
                got = got + tied.get_parameter(name.replace("jepa.", "jepa.noise_")).grad
            assert (parameter.grad - got).norm() <= 1e-5 * parameter.grad.norm(), name


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
        expected |= {"loss_noise", *(f"loss_level_{k}" for k in range(4))}
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
        {"method": "ncjepa", "noise": {"map": "all", "level_weights": (1.0, 2.0, 3.0, 4.0)}},
        {"method": "ncjepa", "noise": {"space": "encoder_tied", "level_embedding": "add"}},
        {"method": "cjepa", "vicreg": {"on": "pred_vs_target"}},
        {
            "method": "ncjepa",
            "noise": {"map": "all"},
            "model": {"predictor": {"width": 24, "heads": 2, "context": "shared"}},
        },
    ],
    ids=["default", "all-list", "tied-embed", "pred_vs_target", "shared"],
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


def test_parameter_groups():
    module = TrainModule(tiny_config("ncjepa", noise={"level_embedding": "add"}))
    decayed, plain = param_groups(module, 0.04)
    assert decayed["weight_decay"] == 0.04
    assert plain["weight_decay"] == 0.0
    assert decayed["decayed"]
    assert not plain["decayed"]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    group = {names[id(p)]: g["decayed"] for g in (decayed, plain) for p in g["params"]}
    assert group.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert not any("pos_embed" in name for name in group)
    for name, is_decayed in group.items():
        is_norm = "norm" in name or name in ("jepa.projector.1.weight", "jepa.projector.4.weight")
        assert is_decayed == (not name.endswith("bias") and not is_norm), name
    assert group["jepa.predictor.mask_token"]
    assert group["jepa.noise_predictor.mask_token"]


# ----------------------------------------------------------------------------------- several ranks

RANK_CASES = {
    "ijepa": {"method": "ijepa"},
    "cjepa": {"method": "cjepa"},
    "njepa": {"method": "njepa"},
    "ncjepa": {"method": "ncjepa"},
    **{
        on: {"method": "cjepa", "vicreg": {"on": on, "weight": 0.1, "projector": (16, 24)}}
        for on in ("pred_vs_target", "context", "tokens")
    },
}
WORLD, GLOBAL = 2, 8


def one_case(options: dict, rank: int, world: int, group: dist.ProcessGroup | None) -> dict:
    """Loss, metrics, gradients and buffers of one rank's share of a global batch."""
    config = tiny_config(**options)
    batch = make_batch(config, batch=GLOBAL)
    own = slice(rank * GLOBAL // world, (rank + 1) * GLOBAL // world)
    batch = Batch(*(x[own] if isinstance(x, torch.Tensor) else x for x in batch))
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
