"""vicreg against the loop over pairs (T4) and against two ranks (T8)."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from njepa_kernels import vicreg


def _pair_loop(views: torch.Tensor, gamma: float, eps: float) -> tuple[torch.Tensor, ...]:
    """Every ordered pair of views, every pair of channels, by the definitions."""
    n_views, n, width = views.shape

    def hinge(x: torch.Tensor) -> torch.Tensor:
        deviations = torch.sqrt(torch.var(x, dim=0, unbiased=True) + eps)
        return torch.clamp(gamma - deviations, min=0).mean()

    def off_diagonal(x: torch.Tensor) -> torch.Tensor:
        total = 0 * x.sum()  # width 1 has no pair of channels
        centred = x - x.mean(0)
        for i, j in itertools.permutations(range(width), 2):
            total = total + ((centred[:, i] * centred[:, j]).sum() / (n - 1)) ** 2
        return total / width

    inv, std, cov = [], [], []
    for i, j in itertools.permutations(range(n_views), 2):
        inv.append(((views[i] - views[j]) ** 2).mean())
        std.append(0.5 * (hinge(views[i]) + hinge(views[j])))
        cov.append(off_diagonal(views[i]) + off_diagonal(views[j]))
    return tuple(torch.stack(terms).mean() for terms in (inv, std, cov))


@pytest.mark.parametrize("shape", [(2, 6, 4), (4, 5, 5), (3, 4, 9), (4, 2, 3), (2, 3, 1)], ids=str)
def test_closed_form_is_the_pair_loop(shape: tuple[int, ...]) -> None:
    views = (torch.randn(shape, dtype=torch.float64) * 1.1 + 0.3).requires_grad_()
    terms = vicreg(views, gamma=1.2, eps=1e-3)
    expected = _pair_loop(views, 1.2, 1e-3)
    for name, got, want in zip(terms._fields, terms, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)
        (grad,) = torch.autograd.grad(got, views, retain_graph=True)
        (wanted,) = torch.autograd.grad(want, views, retain_graph=True)
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12, msg=f"d {name}")


@pytest.mark.parametrize("shape", [(7, 4), (4, 9)], ids=str)
def test_one_view_is_the_pair_with_itself(shape: tuple[int, int]) -> None:
    u = torch.randn(shape, dtype=torch.float64)
    expected = _pair_loop(torch.stack((u, u)), 1.0, 1e-4)
    for given in (u, u.unsqueeze(0)):
        for got, want in zip(vicreg(given), expected, strict=True):
            torch.testing.assert_close(got, want)
    assert vicreg(u).inv == 0.0


def test_invariances() -> None:
    views = torch.randn(3, 12, 5, dtype=torch.float64)
    terms = vicreg(views)
    order = torch.randperm(12)
    for other in (views[:, order], views + torch.randn(5), views[torch.tensor([2, 0, 1])]):
        for got, want in zip(vicreg(other), terms, strict=True):
            torch.testing.assert_close(got, want)
    doubled = vicreg(2 * views)
    torch.testing.assert_close(doubled.inv, 4 * terms.inv)
    torch.testing.assert_close(doubled.cov, 16 * terms.cov)
    torch.testing.assert_close(vicreg(2 * views, gamma=2.0, eps=4e-4).std, 2 * terms.std)


def test_collapsed_views_have_finite_terms_and_gradients() -> None:
    u = torch.ones(2, 8, 4, requires_grad=True)
    terms = vicreg(u)
    assert (terms.inv.item(), terms.cov.item()) == (0.0, 0.0)
    assert terms.std.item() == pytest.approx(1 - 1e-4**0.5)
    sum(terms).backward()  # type: ignore[union-attr]
    assert u.grad is not None
    assert u.grad.isfinite().all()


def test_large_offset_does_not_hurt() -> None:
    """Centring comes first: an offset of 1000 standard deviations leaves the terms in fp32."""
    base = torch.randn(2, 64, 16)
    for got, want in zip(vicreg(base + 1000.0), vicreg(base.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast_compute_in_fp32(dtype: torch.dtype) -> None:
    u = torch.randn(2, 16, 32).to(dtype)
    expected = vicreg(u.float())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = vicreg(u)
    for got, auto, want in zip(vicreg(u), under_autocast, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
        assert torch.equal(auto, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.zeros(4)}, ValueError, "vicreg: u must be [n,D] = [any, any], got [4]"),
        ({"u": torch.zeros(1, 4)}, ValueError, "u must have at least 2 samples over all ranks"),
        ({"u": torch.zeros(4, 1, 8)}, ValueError, "got 1 on 1 rank(s)"),
        ({"u": torch.zeros(0, 4)}, ValueError, "got 0 on 1 rank(s)"),
        ({"u": torch.zeros(2, 0, 4)}, ValueError, "got 0 on 1 rank(s)"),
        ({"u": torch.zeros(4, 0)}, ValueError, "one view and one channel, got [4, 0]"),
        ({"u": torch.zeros(0, 4, 2)}, ValueError, "one view and one channel, got [0, 4, 2]"),
        ({"u": torch.zeros(4, 4).int()}, TypeError, "u must be float32 or"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        ({"impl": "triton"}, RuntimeError, "vicreg: impl='triton' cannot run"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        vicreg(**({"u": torch.zeros(4, 4)} | change))


# Two ranks

WEIGHTS = (25.0, 25.0, 1.0)
SIZES = [(3, 4, 5), (2, 3, 9), (None, 6, 4), (None, 4, 10), (2, 1, 4)]  # M, n per rank, width


def _data(size: tuple[int | None, int, int], rank: int) -> torch.Tensor:
    views, n, width = size
    g = torch.Generator().manual_seed(100 + rank)
    shape = (n, width) if views is None else (views, n, width)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _layer(width: int) -> torch.nn.Linear:
    torch.manual_seed(5)
    return torch.nn.Linear(width, width, dtype=torch.float64)


def _loss(x: torch.Tensor, layer: torch.nn.Linear, group: Any) -> tuple[Any, torch.Tensor]:
    terms = vicreg(layer(x), group=group)
    return terms, sum(w * t for w, t in zip(WEIGHTS, terms, strict=True))  # type: ignore[return-value]


def _rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    results: dict[str, Any] = {}
    for size in SIZES:
        layer = _layer(size[2])
        terms, loss = _loss(_data(size, rank), layer, group)
        loss.backward()
        for parameter in layer.parameters():  # what DDP does
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        results[str(size)] = ([t.detach() for t in terms], layer.weight.grad, layer.bias.grad)
    messages = []
    for u in (torch.zeros(4 + rank, 3), torch.zeros(4, 3) if rank else torch.zeros(2, 4, 3)):
        try:
            vicreg(u, group=group)
        except ValueError as error:
            messages.append(str(error))
    results["messages"] = messages
    half = vicreg(_data((2, 4, 8), rank).bfloat16(), group=group)
    results["half"] = [t.detach() for t in half]
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multirank
def test_two_ranks_are_one_process_on_the_concatenated_batch(tmp_path: Path) -> None:
    mp.spawn(_rank_main, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for size in SIZES:
        layer = _layer(size[2])
        whole = torch.cat([_data(size, 0), _data(size, 1)], dim=-2)
        terms, loss = _loss(whole, layer, None)
        loss.backward()
        for result in ranks:
            values, d_weight, d_bias = result[str(size)]
            for got, want in zip(values, terms, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(d_weight, layer.weight.grad, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(d_bias, layer.bias.grad, rtol=1e-11, atol=1e-11)
    for result in ranks:
        assert result["messages"] == [
            "vicreg: u must have one shape on all ranks, got rank 0: [4, 3]; rank 1: [5, 3]",
            "vicreg: u must have one shape on all ranks, got rank 0: [2, 4, 3]; rank 1: [4, 3]",
        ]
    assert all(torch.equal(a, b) for a, b in zip(*(r["half"] for r in ranks), strict=True))
    assert ranks[0]["half"][0].dtype == torch.float32


#: Ways to allow TF32 products or not, and what the Triton kernel makes of them.
TF32 = {
    "pass": "tf32x3",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "tf32x3",
}


def test_tf32_products_where_the_user_allows_them() -> None:
    """By any setting of torch, each in a fork of its own: the older and the newer do not mix."""
    pytest.importorskip("triton")
    code = (
        "import os, sys, torch\n"
        "from njepa_kernels.ops.vicreg.triton_kernel import _precision\n"
        "for setting in sys.argv[1:]:\n"
        "    if os.fork() == 0:\n"
        "        exec(setting)\n"
        "        print(_precision(), flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    command = [sys.executable, "-c", code, *TF32]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert dict(zip(TF32, done.stdout.split(), strict=True)) == TF32
