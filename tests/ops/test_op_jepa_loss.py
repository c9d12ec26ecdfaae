"""jepa_loss against scalar loops and against the published computation, bit for bit."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from njepa_kernels import jepa_loss
from torch.nn import functional as F

B, M, KT, N, D = 3, 2, 4, 9, 6


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "pred": torch.randn(M * B, KT, D, generator=g).to(dtype),
        "h": (torch.randn(B, N, D, generator=g) * 2 + 3).to(dtype),
        "target_idx": torch.randint(0, N, (B, M, KT), generator=g),
    }


def _published(pred: torch.Tensor, h: torch.Tensor, target_idx: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(h, (h.size(-1),))
    masks = [target_idx[:, m] for m in range(target_idx.shape[1])]
    picked = [torch.gather(normed, 1, m[..., None].repeat(1, 1, h.size(-1))) for m in masks]
    return F.smooth_l1_loss(pred, torch.cat(picked, dim=0))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, 2.5])
@pytest.mark.parametrize("level", [None, "block", "token"])
def test_against_scalar_loops(level: str | None, beta: float) -> None:
    inputs = _inputs(torch.float64)
    weight = {"block": torch.rand(B, M), "token": torch.rand(B, M, KT), None: None}[level]
    total, per_token = 0.0, torch.zeros(B, M, KT, dtype=torch.float64)
    for b in range(B):
        for m in range(M):
            for t in range(KT):
                row = inputs["h"][b, inputs["target_idx"][b, m, t]].tolist()
                mean = sum(row) / D
                root = math.sqrt(sum((v - mean) ** 2 for v in row) / D + 1e-5)
                w = 1.0
                if weight is not None:
                    w = float(weight[b, m] if level == "block" else weight[b, m, t])
                for c in range(D):
                    e = abs(float(inputs["pred"][m * B + b, t, c]) - (row[c] - mean) / root)
                    s = e * e / (2 * beta) if e < beta else e - beta / 2
                    per_token[b, m, t] += s / D
                    total += w * s / (B * M * KT * D)
    result = jepa_loss(**inputs, weight=weight, beta=beta)
    assert float(result.loss) == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(result.per_token, per_token)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 197, 100), (8, 4, 33, 196, 192), (5, 3, 7, 64, 384)], ids=str
)
def test_bits_of_the_published_loss_and_gradient(shape: tuple[int, ...]) -> None:
    b, m, kt, n, d = shape
    pred = torch.randn(m * b, kt, d, requires_grad=True)
    h = torch.randn(b, n, d) * 3 + 1
    target_idx = torch.rand(b * m, n).argsort(1)[:, :kt].view(b, m, kt)
    ours = jepa_loss(pred, h, target_idx, impl="reference").loss
    theirs = _published(pred, h, target_idx)
    assert torch.equal(ours, theirs)
    (d_ours,) = torch.autograd.grad(ours, pred)
    (d_theirs,) = torch.autograd.grad(theirs, pred)
    assert torch.equal(d_ours, d_theirs)


def test_weight_one_changes_no_bit() -> None:
    inputs = _inputs()
    plain = jepa_loss(**inputs)
    for shape in ((B, M), (B, M, KT)):
        weighted = jepa_loss(**inputs, weight=torch.ones(shape))
        assert torch.equal(weighted.loss, plain.loss)
        assert torch.equal(weighted.per_token, plain.per_token)


def test_per_token_gives_the_loss_of_each_block() -> None:
    inputs = _inputs()
    inputs["pred"].requires_grad_()
    result = jepa_loss(**inputs, weight=torch.rand(B, M, requires_grad=True))
    assert result.loss.requires_grad
    assert not result.per_token.requires_grad
    one = inputs["target_idx"][:, 1:]
    block = jepa_loss(inputs["pred"][B:], inputs["h"], one).loss
    torch.testing.assert_close(result.per_token[:, 1].mean(), block)


def test_targets_get_no_gradient_and_weights_do() -> None:
    inputs = _inputs()
    h = inputs["h"].requires_grad_()
    pred = inputs["pred"].requires_grad_()
    weight = torch.rand(B, M, requires_grad=True)
    result = jepa_loss(**inputs, weight=weight)
    result.loss.backward()
    assert h.grad is None
    assert pred.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, result.per_token.mean(2) / (B * M))


def test_shift_and_scale_of_the_targets_do_not_matter() -> None:
    inputs = _inputs(torch.float64)
    moved = inputs | {"h": inputs["h"] * 50.0 - 4.0}
    first = jepa_loss(**inputs, eps=1e-12).loss
    torch.testing.assert_close(first, jepa_loss(**moved, eps=1e-12).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_fp32(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    result, expected = jepa_loss(**inputs), jepa_loss(**wide)
    assert result.loss.dtype == result.per_token.dtype == torch.float32
    assert torch.equal(result.loss, expected.loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(jepa_loss(**wide).loss, expected.loss)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"pred": torch.zeros(B, M, KT, D)},
            ValueError,
            "jepa_loss: pred must be [M*B,Kt,D] = [6, 4, 6], got [3, 2, 4, 6]",
        ),
        ({"pred": torch.zeros(B, KT, D)}, ValueError, "= [6, 4, 6], got [3, 4, 6]"),
        ({"h": torch.zeros(B, N)}, ValueError, "h must be [B,N,D]"),
        (
            {"target_idx": torch.full((B, M, KT), 9)},
            ValueError,
            "target_idx must be int64 in [0, 9)",
        ),
        ({"target_idx": torch.zeros(B, KT).long()}, ValueError, "target_idx must be [B,M,Kt]"),
        ({"weight": torch.zeros(M, B)}, ValueError, "weight must be [B,M] or [B,M,Kt] = [3, 2]"),
        ({"weight": 2.0}, TypeError, "weight must be a torch.Tensor"),
        ({"beta": -1.0}, ValueError, "beta must be at least 0, got -1.0"),
        ({"beta": float("nan")}, ValueError, "beta must be at least 0, got nan"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        ({"impl": "triton"}, RuntimeError, "jepa_loss: impl='triton' cannot run"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        jepa_loss(**(_inputs() | change))
