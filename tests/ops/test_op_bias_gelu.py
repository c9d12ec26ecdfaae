"""What only bias_gelu promises."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from njepa_kernels import available_impls, bias_gelu
from njepa_kernels._runtime.dispatch import choose
from torch.nn import functional as F

CPU = torch.device("cpu")


def _runs(impl: str) -> bool:
    try:
        return choose("bias_gelu", impl, CPU) == impl
    except RuntimeError:
        return False


IMPLS = [impl for impl in available_impls()["bias_gelu"] if _runs(impl)]
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_kind = pytest.mark.parametrize("kind", ["none", "tanh"])


@each_impl
def test_values_against_loops(impl: Any) -> None:
    x, bias = 2 * torch.randn(3, 9), torch.randn(9)
    got = {kind: bias_gelu(x, bias, kind, impl=impl) for kind in ("none", "tanh")}  # type: ignore[arg-type]
    for r in range(3):
        for i in range(9):
            u = float(x[r, i]) + float(bias[i])
            erf = 0.5 * u * (1 + math.erf(u / math.sqrt(2)))
            tanh = 0.5 * u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            assert float(got["none"][r, i]) == pytest.approx(erf, rel=1e-5, abs=1e-6)
            assert float(got["tanh"][r, i]) == pytest.approx(tanh, rel=1e-5, abs=1e-6)


@each_kind
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
def test_all_of_the_line_in_value_and_slope(impl: Any, kind: Any) -> None:
    """Against fp64, from where one side is zero to where the other is the identity.

    The reference is torch's, whose slope for tanh is off by 1e-6.
    """
    x = torch.linspace(-20, 20, 16_001).view(1, -1)
    bias = torch.zeros(x.shape[1])
    got, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out, true = bias_gelu(got, bias, kind, impl=impl), F.gelu(exact, approximate=kind)
    torch.testing.assert_close(out.double(), true, rtol=3e-7, atol=4e-7)
    slope, true_slope = (torch.autograd.grad(t.sum(), i)[0] for t, i in ((out, got), (true, exact)))
    torch.testing.assert_close(slope.double(), true_slope, rtol=3e-7, atol=6e-7)


@each_kind
@each_impl
def test_limits(impl: Any, kind: Any) -> None:
    huge = torch.tensor([[3e38, float("inf"), 100.0, -100.0, 0.0]])
    if impl == "reference":  # torch's own doubles x before it halves it, with AVX512
        huge[0, :2] = 1e38
    out = bias_gelu(huge, torch.zeros(5), kind, impl=impl)
    assert out.tolist() == [[*huge[0, :3].tolist(), 0.0, 0.0]]
    assert bool(bias_gelu(torch.full((1, 3), float("nan")), torch.zeros(3), kind).isnan().all())


@each_impl
def test_the_bias_is_added_in_fp32(impl: Any) -> None:
    """Its last bits count beside a bf16 product, and so do those of its gradient."""
    x = torch.ones(1000, 4).bfloat16()
    bias = torch.full((4,), 2.0**-12, requires_grad=True)
    assert not torch.equal(bias_gelu(2 * x, bias, impl=impl).float() - 2, torch.zeros(1000, 4))
    exact = F.gelu(x.double() + bias.double()).sum()
    (want,) = torch.autograd.grad(exact, bias)
    (got,) = torch.autograd.grad(bias_gelu(x, bias, impl=impl).sum(), bias)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a torch.Tensor [..., D] with D of at least 1"),
        ({"x": torch.zeros(())}, ValueError, "with D of at least 1, got []"),
        ({"bias": torch.zeros(7)}, ValueError, "bias must be [D] = [8], got [7]"),
        ({"approximate": "erf"}, ValueError, "approximate must be none or tanh, got 'erf'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 8), "bias": torch.zeros(8)}
    with pytest.raises(error, match="bias_gelu: .*" + re.escape(message)):
        bias_gelu(**(good | change))
