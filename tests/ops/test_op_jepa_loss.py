"""jepa_loss against scalar loops and against the published computation, bit for bit."""

from __future__ import annotations

import gc
import math
import re
from typing import Any

import pytest
import torch
from njepa_kernels import JepaLoss, jepa_loss
from njepa_kernels._runtime.dispatch import IMPLEMENTATIONS, choose
from njepa_kernels.ops.jepa_loss import op as loss_op
from torch.nn import functional as F

CPU = torch.device("cpu")
B, M, KT, N, D = 3, 2, 4, 9, 6


def _runs(impl: str) -> bool:
    try:
        return choose("jepa_loss", impl, CPU) == impl
    except RuntimeError:
        return False


IMPLS = [impl for impl in IMPLEMENTATIONS if _runs(impl)]
FUSED = [impl for impl in IMPLS if impl != "reference"]
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_fused = pytest.mark.parametrize("impl", FUSED)
each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16],
    ids=lambda d: str(d).removeprefix("torch."),
)


def _inputs(dtype: torch.dtype = torch.float32, two: bool = False) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    inputs = {
        "pred": torch.randn(M * B, KT, D, generator=g).to(dtype),
        "h": (torch.randn(B, N, D, generator=g) * 2 + 3).to(dtype),
        "target_idx": torch.randint(0, N, (B, M, KT), generator=g),
    }
    if two:
        inputs["noised"] = torch.randn(M * B, KT, D, generator=g).to(dtype)
    return inputs


def _leaves(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [inputs[name].requires_grad_() for name in ("pred", "noised") if name in inputs]


def _gradients(inputs: dict[str, Any], **options: Any) -> tuple[torch.Tensor, ...]:
    """Of the loss by new copies of the predictions."""
    inputs = {n: v.detach().clone() for n, v in inputs.items()}
    leaves = _leaves(inputs)
    return torch.autograd.grad(jepa_loss(**inputs, **options).loss, leaves)


def _published(pred: torch.Tensor, h: torch.Tensor, target_idx: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(h, (h.size(-1),))
    masks = [target_idx[:, m] for m in range(target_idx.shape[1])]
    picked = [torch.gather(normed, 1, m[..., None].repeat(1, 1, h.size(-1))) for m in masks]
    return F.smooth_l1_loss(pred, torch.cat(picked, dim=0))


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, 2.5])
def test_against_scalar_loops(beta: float) -> None:
    inputs = _inputs(torch.float64, two=True)
    clean = noise = distance = 0.0
    for b in range(B):
        for m in range(M):
            for t in range(KT):
                row = inputs["h"][b, inputs["target_idx"][b, m, t]].tolist()
                mean = sum(row) / D
                root = math.sqrt(sum((v - mean) ** 2 for v in row) / D + 1e-5)
                for c in range(D):
                    y = (row[c] - mean) / root
                    p, q = (float(inputs[n][m * B + b, t, c]) for n in ("pred", "noised"))
                    s = [
                        e * e / (2 * beta) if e < beta else e - beta / 2
                        for e in (abs(p - y), abs(q - y))
                    ]
                    clean += s[0] / (B * M * KT * D)
                    noise += s[1] / (B * M * KT * D)
                    distance += (p - q) ** 2 / (B * M * KT * D)
    weights = {"noise_weight": 0.7, "consistency": 0.3, "beta": beta}
    result = jepa_loss(**inputs, **weights)
    expected = (clean + 0.7 * noise + 0.3 * distance, clean, noise, distance)
    assert [float(v.detach()) for v in result] == pytest.approx(expected, rel=1e-12)
    alone = jepa_loss(**(inputs | {"noised": None}), **weights)
    assert float(alone.loss) == float(alone.clean) == pytest.approx(clean, rel=1e-12)
    assert alone[2:] == (None, None)


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


@each_impl
def test_terms_are_detached_and_only_the_loss_is_not(impl: Any) -> None:
    inputs = _inputs(two=True)
    _leaves(inputs)
    for given in (inputs, inputs | {"noised": None}):
        result = jepa_loss(**given, impl=impl)
        assert isinstance(result, JepaLoss)
        assert [t.requires_grad for t in result if t is not None] == [True] + [False] * (
            3 if given["noised"] is not None else 1
        )
        assert all(t.dtype == torch.float32 and t.dim() == 0 for t in result if t is not None)


# Properties --------------------------------------------------------------------------------------


@each_impl
def test_the_predictions_may_change_places(impl: Any) -> None:
    inputs = _inputs(two=True)
    turned = inputs | {"pred": inputs["noised"], "noised": inputs["pred"]}
    options = {"noise_weight": 1.0, "consistency": 0.4, "impl": impl}
    one, other = jepa_loss(**inputs, **options), jepa_loss(**turned, **options)
    torch.testing.assert_close(one.loss, other.loss)
    for a, b in ((one.clean, other.noised), (one.noised, other.clean)):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(one.consistency, other.consistency)
    sides = ("clean", "noised")
    for stop, reverse in (("none", "none"), sides, sides[::-1]):
        dpred, dnoised = _gradients(inputs, **options, consistency_stop=stop)
        turned_noised, turned_pred = _gradients(turned, **options, consistency_stop=reverse)
        torch.testing.assert_close(dpred, turned_pred)
        torch.testing.assert_close(dnoised, turned_noised)


@each_impl
def test_equal_predictions_are_consistent(impl: Any) -> None:
    inputs = _inputs(two=True)
    inputs["noised"] = inputs["pred"].clone()
    result = jepa_loss(**inputs, noise_weight=1.0, consistency=50.0, impl=impl)
    assert float(result.consistency) == 0.0
    torch.testing.assert_close(result.loss, 2 * result.clean)
    dpred, dnoised = _gradients(inputs, noise_weight=1.0, consistency=50.0, impl=impl)
    assert torch.equal(dpred, dnoised)


@each_impl
def test_without_consistency_it_is_the_sum_of_two_losses(impl: Any) -> None:
    inputs = _inputs(two=True)
    single = {name: inputs[name] for name in ("pred", "h", "target_idx")}
    second = single | {"pred": inputs["noised"]}
    options = {"noise_weight": 0.25, "consistency": 0.0, "impl": impl}
    result = jepa_loss(**inputs, **options)
    clean, noise = (jepa_loss(**one, impl=impl).loss for one in (single, second))
    torch.testing.assert_close(result.loss, clean + 0.25 * noise)
    got = _gradients(inputs, **options)
    torch.testing.assert_close(got[0], *_gradients(single, impl=impl))
    torch.testing.assert_close(got[1], 0.25 * _gradients(second, impl=impl)[0])


@each_impl
def test_a_stopped_side_gets_the_gradient_of_its_own_term_alone(impl: Any) -> None:
    inputs = _inputs(two=True)
    options = {"noise_weight": 0.5, "consistency": 2.0, "impl": impl}
    both = _gradients(inputs, **options)
    none = _gradients(inputs, **(options | {"consistency": 0.0}))
    values = jepa_loss(**inputs, **options)
    for stop, want in (("clean", (none[0], both[1])), ("noised", (both[0], none[1]))):
        for got, expected in zip(
            _gradients(inputs, **options, consistency_stop=stop), want, strict=True
        ):
            torch.testing.assert_close(got, expected)
        stopped = jepa_loss(**inputs, **options, consistency_stop=stop)
        assert all(torch.equal(a, b) for a, b in zip(stopped, values, strict=True))
    pull = 2 * 2.0 * (inputs["pred"] - inputs["noised"]) / inputs["pred"].numel()
    torch.testing.assert_close(both[0] - none[0], pull, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(both[1] - none[1], -pull, rtol=1e-4, atol=1e-7)


def test_targets_get_no_gradient() -> None:
    inputs = _inputs(two=True)
    h = inputs["h"].requires_grad_()
    pred, noised = _leaves(inputs)
    jepa_loss(**inputs).loss.backward()
    assert h.grad is None
    assert pred.grad is not None
    assert noised.grad is not None


@each_impl
def test_only_one_of_the_predictions_may_require_a_gradient(impl: Any) -> None:
    inputs = _inputs(two=True)
    both = _gradients(inputs, impl=impl)
    for i, name in enumerate(("pred", "noised")):
        given = inputs | {name: inputs[name].clone().requires_grad_()}
        loss = jepa_loss(**given, impl=impl).loss
        (got,) = torch.autograd.grad(loss, [given[name]])
        assert torch.equal(got, both[i])


def test_shift_and_scale_of_the_targets_do_not_matter() -> None:
    inputs = _inputs(torch.float64, two=True)
    moved = inputs | {"h": inputs["h"] * 50.0 - 4.0}
    first = jepa_loss(**inputs, eps=1e-12).loss
    torch.testing.assert_close(first, jepa_loss(**moved, eps=1e-12).loss)


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_summed_in_fp32(dtype: torch.dtype, impl: Any) -> None:
    inputs = _inputs(dtype, two=True)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    result, expected = jepa_loss(**inputs, impl=impl), jepa_loss(**wide, impl=impl)
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(jepa_loss(**wide, impl=impl).loss, expected.loss)


# A second backward -------------------------------------------------------------------------------


@each_dtype
@each_fused
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_a_graph_that_is_kept_gives_right_gradients_again(
    two: bool, impl: Any, dtype: torch.dtype
) -> None:
    """Whatever came before, and whatever was done to what it returned."""
    inputs = _inputs(dtype, two)
    leaves = _leaves(inputs)
    expected = {}
    for factor in (1.0, 3.0, 0.5):
        loss = jepa_loss(**inputs, impl=impl).loss
        expected[factor] = torch.autograd.grad(loss, leaves, torch.tensor(factor))

    def same(got: tuple[torch.Tensor, ...], factor: float) -> bool:
        return all(torch.equal(a, b) for a, b in zip(got, expected[factor], strict=True))

    for first in (1.0, 3.0):
        loss = jepa_loss(**inputs, impl=impl).loss
        kept = []
        for factor in (first, 0.5, first, 1.0):
            got = torch.autograd.grad(loss, leaves, torch.tensor(factor), retain_graph=True)
            assert same(got, factor)
            kept.append((got, factor))
        assert all(same(got, factor) for got, factor in kept)
        for got, _ in kept:
            for tensor in got:
                tensor.fill_(7.0)
        last = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
        assert same(last, 3.0)
        assert all(bool((tensor == 7.0).all()) for got, _ in kept for tensor in got)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, leaves)


@each_fused
def test_gradients_one_leaf_after_the_other(impl: Any) -> None:
    inputs = _inputs(two=True)
    both = _gradients(inputs, impl=impl)
    pred, noised = _leaves(inputs)
    loss = jepa_loss(**inputs, impl=impl).loss
    (first,) = torch.autograd.grad(loss, [pred], retain_graph=True)
    first.zero_()
    (second,) = torch.autograd.grad(loss, [noised], torch.tensor(2.0), retain_graph=True)
    torch.testing.assert_close(second, 2 * both[1])
    got = torch.autograd.grad(loss, [noised, pred])
    assert torch.equal(got[0], both[1])
    assert torch.equal(got[1], both[0])


@each_fused
def test_accumulated_gradients_and_two_losses_of_one_prediction(impl: Any) -> None:
    inputs = _inputs(two=True)
    both = _gradients(inputs, impl=impl)
    leaves = _leaves(inputs)
    for times in (1, 2, 3):
        jepa_loss(**inputs, impl=impl).loss.backward()
        for leaf, want in zip(leaves, both, strict=True):
            torch.testing.assert_close(leaf.grad, times * want)
    one, other = jepa_loss(**inputs, impl=impl).loss, jepa_loss(**inputs, impl=impl).loss
    for got, want in zip(torch.autograd.grad(one + 2 * other, leaves), both, strict=True):
        torch.testing.assert_close(got, 3 * want)


@each_fused
def test_create_graph_keeps_what_was_saved(impl: Any) -> None:
    """Also where the graph is not kept: the gradients are then part of another one."""
    inputs = _inputs(two=True)
    leaves = _leaves(inputs)
    both = _gradients(inputs, impl=impl)
    for keep in (True, False):
        loss = jepa_loss(**inputs, impl=impl).loss
        cotangent = torch.tensor(2.0, requires_grad=True)
        got = torch.autograd.grad(loss, leaves, cotangent, create_graph=True, retain_graph=keep)
        for gradient, want in zip(got, both, strict=True):
            torch.testing.assert_close(gradient.detach(), 2 * want)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(got[0].sum(), cotangent)


@each_dtype
@each_fused
def test_the_last_backward_returns_the_buffers_of_the_forward(
    impl: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(dtype, two=True)
    leaves = _leaves(inputs)
    given: list[list[int]] = []
    scale = loss_op._scale

    def spy(slopes: list[torch.Tensor], out: list[torch.Tensor], *rest: Any) -> None:
        given.append([t.data_ptr() for t in (*slopes, *out)])
        scale(slopes, out, *rest)

    monkeypatch.setattr(loss_op, "_scale", spy)
    for factor in (1.0, 2.0):
        loss = jepa_loss(**inputs, impl=impl).loss
        new = torch.autograd.grad(loss, leaves, torch.tensor(factor), retain_graph=True)
        got = torch.autograd.grad(loss, leaves, torch.tensor(factor))
        kept, last = given
        slopes = kept[:2]
        assert kept[2:] == [t.data_ptr() for t in new]
        assert not set(kept[2:]) & set(slopes)
        assert last == slopes + slopes
        assert [t.data_ptr() for t in got] == slopes
        assert all(torch.equal(a, b) for a, b in zip(got, new, strict=True))
        given.clear()


@each_fused
def test_without_word_from_the_engine_nothing_is_reused(
    impl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = _gradients(_inputs(two=True), impl=impl)
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    monkeypatch.setattr(loss_op, "_backward_op", operator := _Counting(loss_op._backward_op))
    got = _gradients(_inputs(two=True), impl=impl)
    assert operator.calls == 1
    assert all(torch.equal(a, b) for a, b in zip(got, both, strict=True))


class _Counting:
    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


@each_fused
def test_saved_tensors_that_move_or_are_made_again(impl: Any) -> None:
    both = _gradients(_inputs(two=True), impl=impl)
    inputs = _inputs(two=True)
    leaves = _leaves(inputs)
    with torch.autograd.graph.save_on_cpu():
        loss = jepa_loss(**inputs, impl=impl).loss

    def again(pred: torch.Tensor, noised: torch.Tensor) -> torch.Tensor:
        return jepa_loss(**(inputs | {"pred": pred, "noised": noised}), impl=impl).loss

    remade = torch.utils.checkpoint.checkpoint(again, *leaves, use_reentrant=False)
    for one in (loss, remade):
        for keep in (True, True, False):
            got = torch.autograd.grad(one, leaves, retain_graph=keep)
            assert all(torch.equal(a, b) for a, b in zip(got, both, strict=True))
            for tensor in got:
                tensor.zero_()


@each_fused
def test_targets_and_predictions_may_change_after_the_forward(impl: Any) -> None:
    """The backward needs none of them: buffers may be filled anew, features come from anywhere."""
    both = _gradients(_inputs(two=True), impl=impl)
    inputs = _inputs(two=True)
    leaves = _leaves(inputs)
    with torch.inference_mode():
        h = inputs["h"].clone()
    loss = jepa_loss(**(inputs | {"h": h}), impl=impl).loss
    with torch.no_grad():
        for tensor in leaves:
            tensor.zero_()
    del h, inputs["h"]
    gc.collect()
    got = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, both, strict=True))


# Arguments ---------------------------------------------------------------------------------------


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
        (
            {"noised": torch.zeros(B, KT, D)},
            ValueError,
            "jepa_loss: noised must be [*,*,*] = [6, 4, 6], got [3, 4, 6]",
        ),
        ({"noised": 2.0}, TypeError, "noised must be a torch.Tensor"),
        (
            {"noised": torch.zeros(M * B, KT, D).bfloat16()},
            TypeError,
            "noised must be float32, got bfloat16",
        ),
        ({"noise_weight": -0.5}, ValueError, "noise_weight must be at least 0, got -0.5"),
        ({"consistency": float("nan")}, ValueError, "consistency must be at least 0, got nan"),
        (
            {"consistency_stop": "pred"},
            ValueError,
            "consistency_stop must be none, clean or noised, got 'pred'",
        ),
        ({"beta": -1.0}, ValueError, "beta must be at least 0, got -1.0"),
        ({"beta": float("nan")}, ValueError, "beta must be at least 0, got nan"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        ({"impl": "triton"}, RuntimeError, "jepa_loss: impl='triton' cannot run"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        jepa_loss(**(_inputs() | change))
