"""What the shared cases do not reach: tails of tiles, empty sides, mixed types, special values."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from njepa_kernels import (
    ema_update_,
    gather_tokens,
    jepa_loss,
    predictor_tokens,
    vicreg,
)
from njepa_kernels._runtime import by_index
from njepa_kernels._runtime.launch import launch
from njepa_kernels.ops.add_layer_norm.cases import _case as norm_case
from njepa_kernels.ops.bias_gelu.cases import _case as gelu_case
from njepa_kernels.ops.gather_tokens.cases import _case as gather_case
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.predictor_tokens import triton_kernel as predictor_kernels
from njepa_kernels.ops.predictor_tokens.cases import _case as predictor_case
from njepa_kernels.ops.vicreg.cases import _case as vicreg_case
from njepa_kernels.testing import OpCase, assert_case_within_baseline


@pytest.fixture(autouse=True)
def _poisoned() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_gather_without_indices_has_a_zero_gradient() -> None:
    x = torch.randn(2, 5, 20, requires_grad=True)
    pos = torch.randn(5, 20, requires_grad=True)
    out = gather_tokens(x, torch.zeros(2, 0, dtype=torch.int64), pos, impl="triton")
    assert out.shape == (2, 0, 20)
    out.sum().backward()
    assert x.grad is not None
    assert pos.grad is not None
    assert not x.grad.any()
    assert not pos.grad.any()


def test_gather_over_several_index_blocks_with_many_duplicates() -> None:
    x = torch.randn(2, 19, 8, requires_grad=True)
    pos = torch.randn(19, 8, requires_grad=True)
    idx = torch.randint(0, 19, (2, 3, 70))
    idx[0] = 7
    grads = []
    for impl in ("triton", "reference"):
        out = gather_tokens(x, idx, pos, impl=impl)  # type: ignore[arg-type]
        cotangent = torch.arange(out.numel()).view(out.shape) % 13 - 6.0
        grads.append(torch.autograd.grad(out, [x, pos], cotangent))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_predictor_without_targets_or_context() -> None:
    pos, mask_token = torch.randn(6, 12), torch.randn(12, requires_grad=True)
    for kc, kt in ((3, 0), (0, 3)):
        context = torch.randn(2, kc, 12, requires_grad=True)
        context_idx = torch.randint(0, 6, (2, kc))
        target_idx = torch.randint(0, 6, (2, 2, kt))
        results = []
        for impl in ("triton", "reference"):
            out = predictor_tokens(
                context,
                pos,
                mask_token,
                context_idx,
                target_idx,
                impl=impl,  # type: ignore[arg-type]
            )
            results.append((out, *torch.autograd.grad(out.square().sum(), [context, mask_token])))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("learnt", [False, True])
def test_frozen_positions_launch_no_kernel(learnt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def spy(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(predictor_kernels, "launch", spy)
    monkeypatch.setattr(by_index, "launch", spy)
    leaves = [torch.randn(2, 3, 12, requires_grad=True), torch.randn(6, 12), torch.zeros(12)]
    leaves[1].requires_grad_(learnt)
    idx = torch.randint(0, 6, (2, 2, 3))
    predictor_tokens(*leaves, idx[:, 0], idx, impl="triton").sum().backward()
    names = [f"_predictor_tokens_{name}_kernel" for name in ("fwd", "bwd_context", "bwd_target")]
    if learnt:
        names += ["_invert_index_kernel", "_sum_by_index_kernel"]
    assert launched == names


#: Beyond what is held in registers as a whole: rows in column tiles, the last one not full.
WIDE = [
    predictor_case("b2-m2-kc3-kt2-n9-d2304", 2, 2, 3, 2, 9, 2304),
    loss_case("b2-m2-kt2-n9-d2304", 2, 2, 2, 9, 2304),
    loss_case("b1-m2-kt2-n9-d4100-noised", 1, 2, 2, 9, 4100, noised=True),
    gather_case("b2-n9-k4-d2304", 2, 9, 4, 2304),
    vicreg_case("m2-n9-d2304", 2, 9, 2304),
    norm_case("b1-n5-d2304", 1, 5, 2304),  # this one is held whole all the same
    gelu_case("b1-n40-h2304", 1, 40, 2304),
]


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_wide_rows(case: OpCase) -> None:
    function = partial(case.function, impl="triton")
    for dtype in (torch.float32, torch.bfloat16):
        assert_case_within_baseline(case, function, torch.device("cpu"), dtype, range(2))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_keeps_nan_in_value_and_gradient(beta: float) -> None:
    pred = torch.zeros(2, 1, 20)
    pred[0, 0, 3] = float("nan")
    pred.requires_grad_()
    h, idx = torch.randn(2, 4, 20), torch.zeros(2, 1, 1, dtype=torch.int64)
    result = jepa_loss(pred, h, idx, beta=beta, impl="triton")
    assert bool(result.loss.isnan())
    result.loss.backward()
    assert pred.grad is not None
    assert bool(pred.grad[0, 0, 3].isnan())
    assert int(pred.grad.isnan().sum()) == 1


def test_loss_gradient_survives_fp16_at_a_real_size() -> None:
    """1 / (B M Kt D) lies below fp16; times the scale of a loss scaler it does not."""
    pred = torch.randn(32, 16, 384).half().requires_grad_()
    h, idx = torch.randn(32, 20, 384).half(), torch.randint(0, 20, (32, 1, 16))
    grads = []
    for impl in ("triton", "reference"):
        loss = jepa_loss(pred, h, idx, impl=impl).loss  # type: ignore[arg-type]
        grads.append(torch.autograd.grad(loss, pred, torch.tensor(65536.0))[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-3, atol=1e-5)


def test_loss_backward_twice_and_in_parts() -> None:
    pred = torch.randn(2, 3, 16, requires_grad=True)
    h, idx = torch.randn(2, 4, 16), torch.randint(0, 4, (2, 1, 3))
    loss = jepa_loss(pred, h, idx, impl="triton").loss
    (once,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, pred, retain_graph=True)
    torch.testing.assert_close(twice, 2 * once)
    (again,) = torch.autograd.grad(loss, pred)
    assert torch.equal(again, once)


@pytest.mark.parametrize("shape", [(2, 70, 40), (2, 40, 70), (3, 130, 66)], ids=str)
def test_vicreg_over_several_tiles(shape: tuple[int, ...]) -> None:
    u = (torch.randn(shape) * 1.3 + 40.0).requires_grad_()
    results = []
    for impl in ("triton", "reference"):
        terms = vicreg(u, impl=impl)  # type: ignore[arg-type]
        total = 25 * terms.inv + 25 * terms.std + terms.cov
        results.append((*terms, *torch.autograd.grad(total, u)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.99999, dtype=torch.float64)], ids=str)
def test_ema_over_several_programs_and_types(momentum: Any, aligned: bool) -> None:
    start = 0 if aligned else 1
    targets = [torch.randn(n + 1)[start : start + n] for n in (4096, 5000, 1, 9000)]
    sources = [torch.randn(t.shape) for t in targets]
    sources[1] = sources[1].bfloat16()
    shadow = [t.bfloat16() for t in targets]
    before = [t.double() for t in targets]
    versions = [t._version for t in targets]
    for _ in range(2):  # the second call finds its table
        ema_update_(targets, sources, momentum, shadow, impl="triton")
    m = float(momentum)
    for i, target in enumerate(before):
        exact = m * (m * target + (1 - m) * sources[i].double()) + (1 - m) * sources[i].double()
        torch.testing.assert_close(targets[i].double(), exact, rtol=3e-7, atol=3e-7)
        # One unit of bf16: the interpreter truncates where the GPU rounds to nearest.
        torch.testing.assert_close(shadow[i].float(), targets[i], rtol=2**-7, atol=0)
        assert targets[i]._version > versions[i]
