"""The modules of njepa_kernels.nn: they are the functions, and good citizens of torch.nn."""

from __future__ import annotations

import copy
from typing import Any

import njepa_kernels
import pytest
import torch
from njepa_kernels import nn as ops
from torch import nn

B, N, M, D = 3, 9, 2, 8


def _inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    idx = torch.rand(B, 1 + M, N, generator=draw).argsort(dim=-1)
    return {
        "x": torch.randn(B, N, D, generator=draw),
        "pos": torch.randn(N, D, generator=draw),
        "pred": torch.randn(M * B, 3, D, generator=draw),
        "noised": torch.randn(M * B, 3, D, generator=draw),
        "context_idx": idx[:, 0, :4].contiguous(),
        "target_idx": idx[:, 1:, :3].contiguous(),
        "sigma": torch.rand(B, M, generator=draw),
    }


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_modules_are_the_functions(impl: Any) -> None:
    i = _inputs()
    got = ops.GatherTokens(impl=impl)(i["x"], i["target_idx"], i["pos"])
    want = njepa_kernels.gather_tokens(i["x"], i["target_idx"], i["pos"], impl=impl)
    assert torch.equal(got, want)

    tokens = ops.PredictorTokens(D, i["pos"], impl=impl)
    noise = (i["sigma"], njepa_kernels.NoiseKey(5, 7, torch.arange(B), shared=True))
    context = i["x"][:, :4].contiguous()
    got = tokens(context, i["context_idx"], i["target_idx"], *noise)
    mask_token = tokens.mask_token.detach()
    want = njepa_kernels.predictor_tokens(
        context, i["pos"], mask_token, i["context_idx"], i["target_idx"], *noise, impl=impl
    )
    assert torch.equal(got, want)
    assert not torch.equal(got, tokens(context, i["context_idx"], i["target_idx"]))

    numbers = {"noise_weight": 0.7, "consistency": 0.4, "beta": 0.3, "eps": 1e-3}
    loss = ops.PredictionLoss(**numbers, consistency_stop="clean", impl=impl)
    args = i["pred"], i["x"], i["target_idx"], i["noised"]
    want = njepa_kernels.jepa_loss(*args, **numbers, consistency_stop="clean", impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(loss(*args), want, strict=True))
    assert torch.equal(loss(*args[:3]).loss, want.clean)

    got = ops.VICReg(0.8, 1e-2, impl=impl)(i["x"])
    want = njepa_kernels.vicreg(i["x"], 0.8, 1e-2, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got.cov > 0


def test_impl_reaches_the_op() -> None:
    """What cannot run is refused by the op, so the module's choice has arrived there."""
    i = {name: v.double() if v.is_floating_point() else v for name, v in _inputs().items()}
    for module, args in (
        (ops.GatherTokens(impl="native"), (i["x"], i["target_idx"])),
        (
            ops.PredictorTokens(D, i["pos"], impl="native"),
            (i["x"][:, :4], i["context_idx"], i["target_idx"]),
        ),
        (ops.PredictionLoss(impl="native"), (i["pred"], i["x"], i["target_idx"])),
        (ops.VICReg(impl="native"), (i["x"],)),
    ):
        with pytest.raises(RuntimeError, match="impl='native' cannot run on cpu: float64"):
            module(*args)


def test_repr_names_what_was_chosen() -> None:
    pos = torch.zeros(N, D)
    assert repr(ops.GatherTokens()) == "GatherTokens(impl='auto')"
    assert repr(ops.PredictorTokens(D, pos, impl="reference")) == (
        "PredictorTokens(width=8, n_patches=9, impl='reference')"
    )
    assert repr(ops.PredictionLoss(beta=0.5)) == (
        "PredictionLoss(noise_weight=0.1, consistency=0.1, consistency_stop='none', beta=0.5, "
        "eps=1e-05, impl='auto')"
    )
    assert repr(ops.VICReg()) == "VICReg(gamma=1.0, eps=0.0001, impl='auto')"
    assert "impl='reference'" in repr(ops.Ema(nn.Linear(2, 2), nn.Linear(2, 2), impl="reference"))


def test_position_table_is_a_buffer_or_the_parameter_given() -> None:
    table = torch.randn(N, D)
    fixed = ops.PredictorTokens(D, table)
    assert list(fixed.state_dict()) == ["mask_token", "pos"]
    assert [name for name, _ in fixed.named_parameters()] == ["mask_token"]
    table.zero_()
    assert fixed.pos.abs().min() > 0  # a copy of its own
    assert 0 < fixed.mask_token.abs().max() <= 2.0
    assert fixed.to(torch.bfloat16).pos.dtype == torch.bfloat16

    learnt = ops.PredictorTokens(D, nn.Parameter(torch.randn(N, D)))
    assert sorted(name for name, _ in learnt.named_parameters()) == ["mask_token", "pos"]
    i = _inputs()
    learnt(i["x"][:, :4], i["context_idx"], i["target_idx"]).square().sum().backward()
    used = torch.cat((i["context_idx"].flatten(), i["target_idx"].flatten())).unique()
    moved = learnt.pos.grad.abs().sum(1).nonzero().flatten()
    assert torch.equal(moved, used)
    assert learnt.mask_token.grad.abs().min() > 0


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"pos must be \[N,d\] = \[any, 8\], got \[9, 7\]"):
        ops.PredictorTokens(D, torch.zeros(N, 7))
    with pytest.raises(TypeError, match=r"pos must be a floating torch\.Tensor.*got torch\.int64"):
        ops.PredictorTokens(D, torch.zeros(N, D, dtype=torch.int64))
    with pytest.raises(TypeError, match="got list"):
        ops.PredictorTokens(D, [[0.0]])  # type: ignore[arg-type]
    pair = (nn.Linear(2, 2), nn.Linear(2, 2))
    for make in (
        lambda impl: ops.GatherTokens(impl=impl),
        lambda impl: ops.PredictorTokens(D, torch.zeros(N, D), impl=impl),
        lambda impl: ops.PredictionLoss(impl=impl),
        lambda impl: ops.VICReg(impl=impl),
        lambda impl: ops.Ema(*pair, impl=impl),
    ):
        with pytest.raises(ValueError, match=r"impl must be one of auto, .*, got 'cuda'"):
            make("cuda")


def test_ema_is_the_published_loop() -> None:
    source = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    target = copy.deepcopy(source).requires_grad_(False)
    by_hand = copy.deepcopy(target)
    ema = ops.Ema(target, source)
    for step in range(3):
        with torch.no_grad():
            for p in source.parameters():
                p.add_(torch.randn_like(p))
            for q, p in zip(by_hand.parameters(), source.parameters(), strict=True):
                q.mul_(0.9 + 0.01 * step).add_(p, alpha=1 - (0.9 + 0.01 * step))
        ema.update_(0.9 + 0.01 * step)
    for q, p in zip(target.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(q, p)
    assert target[1].running_mean.abs().max() == 0  # buffers are left alone

    x = torch.randn(4, 3)
    target.eval()
    assert torch.equal(ema(x), target(x))
    assert not ema(x).requires_grad
    assert [name for name, _ in ema.named_parameters()] == [
        f"target.{name}" for name, _ in target.named_parameters()
    ]
    assert all(key.startswith("target.") for key in ema.state_dict())


def test_ema_finds_parameters_that_were_replaced() -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    ema = ops.Ema(target, source)
    state = {name: torch.ones_like(value) for name, value in source.state_dict().items()}
    source.load_state_dict(state, assign=True)
    ema.update_(0.0)
    assert torch.equal(target.weight, torch.ones(2, 2))


def test_ema_refuses() -> None:
    with pytest.raises(ValueError, match="source must have the 2 parameters of target, got 1"):
        ops.Ema(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"counterpart of weight must be \[2, 2\], got \[2, 3\]"):
        ops.Ema(nn.Linear(2, 2), nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"target\.weight must be float32, got torch\.bfloat16"):
        ops.Ema(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    ema = ops.Ema(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 2"):
        ema.update_(2.0)


def test_modules_compile_and_copy() -> None:
    torch.compiler.reset()
    i = _inputs()

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = ops.PredictorTokens(D, i["pos"])
            self.loss = ops.PredictionLoss()
            self.terms = ops.VICReg()

        def forward(self, context: torch.Tensor) -> torch.Tensor:
            tokens = self.tokens(context, i["context_idx"], i["target_idx"])[:, 4:]
            return self.loss(tokens, i["x"], i["target_idx"]).loss + self.terms(tokens[:, 0]).std

    step = copy.deepcopy(Step())
    context = i["x"][:, :4].contiguous()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(context), step(context))
