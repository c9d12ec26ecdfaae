"""What only add_layer_norm promises."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from njepa_kernels import add_layer_norm, available_impls
from njepa_kernels._runtime.dispatch import choose

CPU = torch.device("cpu")
Tensor = torch.Tensor


def _runs(impl: str) -> bool:
    try:
        return choose("add_layer_norm", impl, CPU) == impl
    except RuntimeError:
        return False


IMPLS = [impl for impl in available_impls()["add_layer_norm"] if _runs(impl)]
each_impl = pytest.mark.parametrize("impl", IMPLS)


def _affine(width: int) -> tuple[Tensor, Tensor]:
    return 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)


@each_impl
def test_values_against_loops(impl: Any) -> None:
    x, residual, (weight, bias) = torch.randn(2, 3, 7), torch.randn(2, 3, 7), _affine(7)
    out, total = add_layer_norm(x, residual, weight, bias, 1e-3, impl=impl)
    for b in range(2):
        for n in range(3):
            row = [float(x[b, n, i]) + float(residual[b, n, i]) for i in range(7)]
            mean = sum(row) / 7
            deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / 7 + 1e-3)
            for i in range(7):
                expected = (row[i] - mean) / deviation * float(weight[i]) + float(bias[i])
                assert float(out[b, n, i]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
                assert float(total[b, n, i]) == pytest.approx(row[i], rel=1e-6, abs=1e-6)


@each_impl
def test_a_level_of_the_stream_does_not_show_but_passes_on(impl: Any) -> None:
    x, residual, affine = torch.randn(5, 40), torch.randn(5, 40), _affine(40)
    out, total = add_layer_norm(x, residual, *affine, impl=impl)
    shifted, moved = add_layer_norm(x, residual + 3.0, *affine, impl=impl)
    torch.testing.assert_close(shifted, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved, total + 3.0)


@each_impl
def test_a_stream_of_its_own_type(impl: Any) -> None:
    """bf16 beside an fp32 stream: every result and gradient has the type of what it belongs to."""
    x, residual = torch.randn(4, 50).bfloat16(), torch.randn(4, 50)
    weight, bias = (tensor.half() for tensor in _affine(50))
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight, bias)]
    out, total = add_layer_norm(x, residual, weight, bias, out_dtype=torch.float16, impl=impl)
    assert (out.dtype, total.dtype) == (torch.float16, torch.float32)
    assert torch.equal(total, x.float() + residual)
    grads = torch.autograd.grad(out.float().sin().sum() + total.cos().sum(), leaves)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    # In a stream of 16 bits what is kept is what is normalised.
    low, kept = add_layer_norm(residual, x, weight, bias, out_dtype=torch.float32, impl=impl)
    alone, _ = add_layer_norm(kept.detach(), None, weight, bias, out_dtype=torch.float32, impl=impl)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(low, alone)
    assert torch.autograd.grad(low.sin().sum() + kept.sum(), residual)[0].dtype == torch.float32


@each_impl
def test_gradients_are_those_of_both_ways(impl: Any) -> None:
    x, residual, affine = torch.randn(6, 30), torch.randn(6, 30), _affine(30)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    out, total = add_layer_norm(x, residual, *affine, impl=impl)
    left, right = torch.randn(6, 30), torch.randn(6, 30)
    both = torch.autograd.grad([out, total], [x, residual], [left, right], retain_graph=True)
    (one,) = torch.autograd.grad(out, x, left, retain_graph=True)
    (other,) = torch.autograd.grad(total, residual, right, retain_graph=True)
    assert torch.equal(other, right)
    torch.testing.assert_close(both[0], one + right)
    assert torch.equal(both[0], both[1])
    # Through LayerNorm alone a row's gradient has no level, with weights of 1.
    out, _ = add_layer_norm(x, None, torch.ones(30), torch.zeros(30), impl=impl)
    (level,) = torch.autograd.grad(out, x, left)
    torch.testing.assert_close(level.sum(1), torch.zeros(6), rtol=0, atol=1e-5)


def test_without_a_residual_the_row_itself_comes_back() -> None:
    x = torch.randn(3, 8)
    assert add_layer_norm(x, None, *_affine(8)).residual is x


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 3}, TypeError, "x must be a torch.Tensor [..., D] with D of at least 1, got int"),
        ({"x": torch.zeros(2, 0)}, ValueError, "with D of at least 1, got [2, 0]"),
        ({"x": torch.zeros(2, 8).int()}, TypeError, "x must be float32 or bfloat16"),
        (
            {"residual": torch.zeros(2, 7)},
            ValueError,
            "residual must be [*,*] = [2, 8], got [2, 7]",
        ),
        ({"weight": torch.zeros(7)}, ValueError, "weight must be [D] = [8], got [7]"),
        ({"bias": None}, TypeError, "bias must be a torch.Tensor [D], got NoneType"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be None or torch.float32"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, native"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "x": torch.zeros(2, 8),
        "residual": None,
        "weight": torch.ones(8),
        "bias": torch.ones(8),
    }
    with pytest.raises(error, match="add_layer_norm: .*" + re.escape(message)):
        add_layer_norm(**(good | change))
