"""gather_tokens against a loop over samples and tokens."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from njepa_kernels import debug_checks, gather_tokens


def _loop(x: torch.Tensor, idx: torch.Tensor, pos: torch.Tensor | None) -> torch.Tensor:
    rows = []
    for b, sample in enumerate(idx.reshape(idx.shape[0], -1).tolist()):
        for j in sample:
            rows.append(x[b, j] if pos is None else x[b, j] + pos[j])
    return torch.stack(rows).view(*idx.shape, x.shape[2])


@pytest.mark.parametrize("with_pos", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (3, 2, 7), (3, 1, 1), (3, 1)])
def test_values_and_gradients_against_the_loop(shape: tuple[int, ...], with_pos: bool) -> None:
    x = torch.randn(3, 11, 6, requires_grad=True)
    pos = torch.randn(11, 6, requires_grad=True) if with_pos else None
    idx = torch.randint(0, 11, shape)
    leaves = [x] if pos is None else [x, pos]
    out, expected = gather_tokens(x, idx, pos), _loop(x, idx, pos)
    assert torch.equal(out, expected)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, cotangent)
    for got, want in zip(grads, torch.autograd.grad(expected, leaves, cotangent), strict=True):
        torch.testing.assert_close(got, want)


def test_duplicates_add_up_in_the_gradient() -> None:
    x = torch.randn(1, 4, 3, requires_grad=True)
    gather_tokens(x, torch.tensor([[2, 2, 0, 2]])).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [1.0, 0.0, 3.0, 0.0]


def test_permuting_the_indices_permutes_the_tokens() -> None:
    x, pos, idx = torch.randn(2, 9, 5), torch.randn(9, 5), torch.randint(0, 9, (2, 6))
    order = torch.randperm(6)
    assert torch.equal(gather_tokens(x, idx[:, order], pos), gather_tokens(x, idx, pos)[:, order])


def test_type_follows_x_and_the_sum_is_rounded_once() -> None:
    x, pos = torch.full((1, 1, 1), 256.0, dtype=torch.bfloat16), torch.full((1, 1), 1.25)
    out = gather_tokens(x, torch.zeros(1, 1, dtype=torch.int64), pos)
    # 257.25 rounds to 258 in bf16; with pos rounded before (1.25 is exact) and the sum in bf16 too.
    assert out.dtype == torch.bfloat16
    assert out.item() == 258.0
    fine = torch.full((1, 1), 1.0 - 2**-12)  # would round to 1.0 first, and 257 then to 256
    assert gather_tokens(x, torch.zeros(1, 1, dtype=torch.int64), fine + 0.002).item() == 258.0


GOOD: dict[str, Any] = {
    "x": torch.zeros(2, 5, 4),
    "idx": torch.zeros(2, 3, dtype=torch.int64),
    "pos": torch.zeros(5, 4),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "gather_tokens: x must be a torch.Tensor [B,N,D], got list"),
        ({"x": torch.zeros(5, 4)}, ValueError, "x must be [B,N,D] = [any, any, any], got [5, 4]"),
        ({"x": torch.zeros(2, 5, 4, dtype=torch.int32)}, TypeError, "x must be float32 or"),
        ({"idx": GOOD["idx"].int()}, TypeError, "idx must be int64, got int32"),
        ({"idx": GOOD["idx"][:1]}, ValueError, "idx must be [B,K] = [2, any], got [1, 3]"),
        ({"idx": GOOD["idx"][0]}, ValueError, "idx must be [B,K] = [2, any], got [3]"),
        ({"idx": GOOD["idx"] + 5}, ValueError, "idx must be int64 in [0, 5), got 5"),
        ({"idx": GOOD["idx"] - 1}, ValueError, "idx must be int64 in [0, 5), got -1"),
        ({"pos": torch.zeros(1, 5, 4)}, ValueError, "pos must be [N,D] = [5, 4], got [1, 5, 4]"),
        ({"pos": torch.zeros(6, 4)}, ValueError, "pos must be [N,D] = [5, 4], got [6, 4]"),
        ({"pos": torch.zeros(5, 4, device="meta")}, ValueError, "pos must be on cpu, got meta"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, native, triton, reference"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run on cpu: "),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        gather_tokens(**(GOOD | change))


def test_shapes_without_values() -> None:
    """On devices whose values cannot be read the checks of values are left out, debug or not."""
    meta = {name: tensor.to("meta") for name, tensor in GOOD.items()}
    debug_checks(True)
    try:
        assert gather_tokens(**meta).shape == (2, 3, 4)
    finally:
        debug_checks(False)
