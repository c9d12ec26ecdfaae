"""A second backward of jepa_loss, whose forward leaves the gradients in place."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from njepa_kernels import jepa_loss
from njepa_kernels.ops.jepa_loss import op as loss_op
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.loss_inputs import each_dtype, each_fused, gradients_of, leaves_of, make_inputs


@each_dtype
@each_fused
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_a_graph_that_is_kept_gives_right_gradients_again(
    two: bool, impl: Any, dtype: torch.dtype
) -> None:
    """Whatever came before, and whatever was done to what it returned."""
    inputs = make_inputs(dtype, two)
    leaves = leaves_of(inputs)
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
    inputs = make_inputs(two=True)
    both = gradients_of(inputs, impl=impl)
    pred, noised = leaves_of(inputs)
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
    inputs = make_inputs(two=True)
    both = gradients_of(inputs, impl=impl)
    leaves = leaves_of(inputs)
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
    inputs = make_inputs(two=True)
    leaves = leaves_of(inputs)
    both = gradients_of(inputs, impl=impl)
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
    inputs = make_inputs(dtype, two=True)
    leaves = leaves_of(inputs)
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
    both = gradients_of(make_inputs(two=True), impl=impl)
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    monkeypatch.setattr(loss_op, "_backward_op", operator := _Counting(loss_op._backward_op))
    got = gradients_of(make_inputs(two=True), impl=impl)
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
    both = gradients_of(make_inputs(two=True), impl=impl)
    inputs = make_inputs(two=True)
    leaves = leaves_of(inputs)
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
    """The backward needs none of them: buffers may be filled again, features come from anywhere."""
    both = gradients_of(make_inputs(two=True), impl=impl)
    inputs = make_inputs(two=True)
    leaves = leaves_of(inputs)
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


class _Zeros(TorchDispatchMode):
    """Elements of the tensors that are filled with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if "zero" in str(func):
            self.elements += out.numel()
        return out


@each_fused
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_no_zeros_in_the_place_of_gradients_that_nobody_has(two: bool, impl: Any) -> None:
    """The slopes are outputs of the operator; autograd would make a gradient of each."""
    inputs = make_inputs(two=two)
    leaves = leaves_of(inputs)
    loss = jepa_loss(**inputs, impl=impl).loss
    with _Zeros() as zeros:
        torch.zeros(2)
        torch.autograd.grad(loss, leaves)
    assert zeros.elements == 2


class _Cut(torch.autograd.Function):
    """The identity, which hands no gradient on."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


@each_fused
def test_a_loss_without_a_gradient_gives_none(impl: Any) -> None:
    inputs = make_inputs(two=True)
    leaves = leaves_of(inputs)
    _Cut.apply(jepa_loss(**inputs, impl=impl).loss).backward()
    assert [leaf.grad for leaf in leaves] == [None, None]
