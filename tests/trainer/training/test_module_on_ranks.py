"""The trained module on two ranks is that of one rank with the doubled batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from njepa.models.projector import DistributedBatchNorm
from njepa.training.ema import make_target
from njepa.training.module import TrainModule
from tests.support.tiny import make_batch, rows_of, tiny_config

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
    with torch.no_grad():
        h = make_target(module.jepa.encoder)(batch.images)
    loss, metrics = module(batch, h)
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
