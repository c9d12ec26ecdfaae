"""vicreg where products are summed as tensor cores do: added terms are cut off, not rounded."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from njepa_kernels.testing import all_cases, assert_case_within_baseline
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

CPU = torch.device("cpu")


def _cut(values: Any, largest: Any) -> Any:
    """``values`` towards zero, to a multiple of the last of the 24 bits of ``largest``."""
    unit = np.ldexp(1.0, np.frexp(largest)[1] - 24)
    return np.trunc(values / unit) * unit


def _mma(a: Any, b: Any, total: Any) -> Any:
    """total + a b, eight products at a time.

    As measured by Fasi, Higham, Mikaitis and Pranesh (2021, doi:10.7717/peerj-cs.330): the products
    are exact, all terms are cut off at the last bit of the largest one, and so is their sum. Later
    devices keep one or two bits more; this is the worst of them.
    """
    for k in range(0, a.shape[1], 8):
        products = a[:, k : k + 8].T[:, :, None] * b[k : k + 8][:, None, :]
        terms = np.concatenate([total[None], products])
        total = _cut(terms, np.abs(terms).max(axis=0)).sum(axis=0)
        total = _cut(total, np.abs(total))
    return total


def _tf32(x: Any) -> Any:
    """fp32 to the nearest value with 11 significant bits, in fp64."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32).astype(np.float64)


def _dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, _: Any) -> Any:
    """Three products per block, the small parts first; blocks are added in fp32, rounded."""
    assert precision.name == "TF32x3"
    a_big, b_big = _tf32(a.data), _tf32(b.data)
    a_small, b_small = _tf32(a.data - a_big), _tf32(b.data - b_big)
    total = np.zeros(acc.data.shape)
    for left, right in ((a_small, b_big), (a_big, b_small), (a_big, b_big)):
        total = _mma(left, right, total)
    return TensorHandle(total.astype(np.float32) + acc.data, acc.dtype.scalar)


def test_the_simulated_product_is_biased_towards_zero() -> None:
    """What this file is about; a simulation that rounds would prove nothing."""
    x = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    big = _tf32(x)
    exact = np.square(big).sum(axis=1)
    got = np.diagonal(_mma(big, big.T.copy(), np.zeros((32, 32))))
    relative = (got - exact) / exact
    assert relative.max() <= 0.0
    assert -1e-6 < relative.mean() < -5e-8


def test_the_terms_are_within_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = [case for case in all_cases("vicreg") if case.size == "m4-n128-d384"]
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)
    function = partial(case.function, impl="triton")
    with torch.no_grad():
        assert_case_within_baseline(case, function, CPU, torch.float32, range(3), "cut off")
