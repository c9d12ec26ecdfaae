"""ema_update_ against the formula in double precision."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from njepa_kernels import ema_update_

SHAPES = [(4,), (3, 5), (), (0,), (2, 2, 2)]


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "targets": [torch.randn(shape) for shape in SHAPES],
        "sources": [torch.randn(shape).to(dtype) for shape in SHAPES],
        "momentum": 0.996,
        "shadow": [torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES],
    }


def _momenta() -> list[Any]:
    values: list[Any] = [0.0, 0.5, 0.996, 0.99999, 1.0, 1]
    return [*values, torch.tensor(0.996, dtype=torch.float64), torch.tensor(0.75)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("momentum", _momenta(), ids=str)
def test_formula(momentum: float | torch.Tensor, dtype: torch.dtype) -> None:
    inputs = _inputs(dtype) | {"momentum": momentum}
    before = [t.clone() for t in inputs["targets"]]
    m = float(momentum)
    assert ema_update_(**inputs) is None  # type: ignore[func-returns-value]
    for i, (target, source) in enumerate(zip(before, inputs["sources"], strict=True)):
        exact = m * target.double() + (1.0 - m) * source.double()
        got = inputs["targets"][i]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=3e-7, atol=3e-7)
        assert torch.equal(inputs["shadow"][i], got.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreach_equals_the_loop_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype) | {"shadow": None}
    looped = [t.clone() for t in inputs["targets"]]
    for target, source in zip(looped, inputs["sources"], strict=True):
        target.mul_(0.996).add_(source.float(), alpha=1.0 - 0.996)
    ema_update_(**inputs, impl="reference")
    assert all(torch.equal(a, b) for a, b in zip(inputs["targets"], looped, strict=True))


@pytest.mark.parametrize("momentum", [0.99999, torch.tensor(0.99999, dtype=torch.float64)], ids=str)
def test_one_minus_momentum_is_not_taken_in_fp32(momentum: float | torch.Tensor) -> None:
    target = torch.zeros(1)
    ema_update_([target], [torch.ones(1)], momentum)
    assert target.item() == pytest.approx(1e-5, rel=1e-6)


def test_many_small_steps_do_not_stall() -> None:
    """In fp32 the mean follows; in bf16 steps of 0.4 % would be rounded away."""
    targets, shadow = [torch.zeros(8)], [torch.zeros(8, dtype=torch.bfloat16)]
    for _ in range(2000):
        ema_update_(targets, [torch.ones(8)], 0.999, shadow)
    torch.testing.assert_close(targets[0], torch.full((8,), 1 - 0.999**2000), rtol=1e-4, atol=0)
    assert torch.equal(shadow[0], targets[0].bfloat16())


def test_parameters_are_updated_outside_autograd() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    source = torch.nn.Parameter(torch.ones(3))
    ema_update_([parameter], [source], 0.75)
    assert parameter.tolist() == [0.25] * 3
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_nothing_to_do() -> None:
    ema_update_([], [], 0.9)
    ema_update_([], [], 0.9, [])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"sources": []},
            ValueError,
            "ema_update_: sources must have 5 tensors, as targets has, got 0",
        ),
        ({"shadow": []}, ValueError, "shadow must have 5 tensors, as targets has, got 0"),
        (
            {"targets": [torch.zeros(s).half() for s in SHAPES]},
            TypeError,
            "targets[0] must be float32, got float16",
        ),
        (
            {"sources": [torch.zeros(s) for s in [*SHAPES[:-1], (2, 2)]]},
            ValueError,
            "sources[4] must be [*,*,*] = [2, 2, 2], got [2, 2]",
        ),
        (
            {"sources": [torch.zeros(s).int() for s in SHAPES]},
            TypeError,
            "sources[0] must be float32 or",
        ),
        (
            {"shadow": [torch.zeros(s) for s in SHAPES]},
            TypeError,
            "shadow[0] must be bfloat16, got float32",
        ),
        ({"momentum": 1.5}, ValueError, "momentum must be in [0, 1], got 1.5"),
        ({"momentum": float("nan")}, ValueError, "momentum must be in [0, 1], got nan"),
        ({"momentum": torch.tensor(-0.5)}, ValueError, "momentum must be in [0, 1], got -0.5"),
        ({"momentum": torch.ones(1)}, TypeError, "momentum must be a float or a 0-dim floating"),
        ({"impl": "triton"}, RuntimeError, "ema_update_: impl='triton' cannot run"),
    ],
)
def test_bad_arguments_change_nothing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = _inputs() | change
    before = [t.clone() for t in inputs["targets"]]
    with pytest.raises(error, match=re.escape(message)):
        ema_update_(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs["targets"], before, strict=True))
