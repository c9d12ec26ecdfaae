"""Targets that accelerate defers up to the loss: any other use computes the published ones."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from njepa_kernels import integrations
from njepa_kernels.integrations._deferred import DeferredTargets
from torch import nn

from bench.published import script as style
from tests.support.accelerated import B, N


def _targets(dtype: torch.dtype = torch.float32, repeat: int = 2) -> tuple[Any, Any]:
    """(deferred, published) targets of the same features."""
    torch.manual_seed(1)
    h = torch.randn(B, N, 8).to(dtype)
    _, masks = style.draw_masks(B, N, 7, 3)
    out = []
    for accelerated in (True, False):
        if accelerated:
            integrations.accelerate(style)
        with torch.no_grad():
            y = style.apply_masks(style.F.layer_norm(h, (8,)), masks)
            out.append(style.repeat_interleave_batch(y, B, repeat=repeat))
        integrations.restore(style)
    assert type(out[0]) is DeferredTargets
    assert type(out[1]) is torch.Tensor
    return out[0], out[1]


def test_metadata_of_deferred_targets_costs_nothing() -> None:
    got, want = _targets(torch.bfloat16)
    assert isinstance(got, torch.Tensor)
    for ask in (
        lambda t: (t.shape, t.dtype, t.device, t.ndim, len(t), t.numel(), t.requires_grad),
        lambda t: (t.size(-1), t.size(), t.dim(), t.is_floating_point(), t.is_cuda),
    ):
        assert ask(got) == ask(want)
    assert got._value is None


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t.mean(),
        lambda t: t + 1,
        lambda t: 1 - t,
        lambda t: t[1:3, 0],
        lambda t: torch.stack([t, t]),
        lambda t: torch.cat((t, torch.zeros(1, 3, 8))),
        lambda t: t.detach().clone(),
        lambda t: t.to(torch.float64),
        lambda t: t.view(-1, 8).T,
        lambda t: torch.from_numpy(t.numpy()),
        lambda t: torch.tensor(t.tolist()),
        lambda t: t.mul_(2.0),
        lambda t: style.apply_masks(t, [torch.zeros(len(t), 2, dtype=torch.int64)]),
        lambda t: style.repeat_interleave_batch(t, B, 2),
        lambda t: F.mse_loss(torch.ones(t.shape), t),
        lambda t: F.smooth_l1_loss(t, torch.ones(t.shape)),
        lambda t: F.smooth_l1_loss(torch.ones(t.shape), t, reduction="none"),
        lambda t: F.smooth_l1_loss(torch.ones(t.shape), t, reduction="sum"),
        lambda t: F.layer_norm(t, (8,)),
        lambda t: copy.deepcopy(t),
        lambda t: pickle.loads(pickle.dumps(t)),
        lambda t: torch.utils._pytree.tree_map(lambda x: x * 3, [t])[0],
    ],
)
def test_any_other_use_computes_the_published_targets(use: Callable[[Any], Any]) -> None:
    deferred, published = _targets()
    integrations.accelerate(style)
    got = use(deferred)
    assert type(got) is torch.Tensor
    assert torch.equal(got, use(published))
    # What it was computed for once it stays, also what was written into it.
    assert torch.equal(deferred + 0, published)
    loss = F.smooth_l1_loss(torch.ones(published.shape), deferred)
    assert torch.equal(loss, F.smooth_l1_loss(torch.ones(published.shape), published))


def test_repr_of_deferred_targets() -> None:
    deferred, published = _targets()
    assert repr(deferred) == repr(published)


def test_use_in_an_autograd_function() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(y)
            return x * y

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return grad * ctx.saved_tensors[0], None

    for targets in _targets():
        x = torch.ones(targets.shape, requires_grad=True)
        Double.apply(x, targets).sum().backward()
        assert torch.equal(x.grad, targets + 0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_to_deferred_targets(beta: float) -> None:
    got, want = _targets()
    values = []
    for targets in (got, want):
        z = torch.linspace(-2, 2, want.numel()).view(want.shape).requires_grad_()
        loss = F.smooth_l1_loss(z, targets, beta=beta)
        (3 * loss).backward()
        values.append((loss.detach(), z.grad))
    assert got._value is None
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    loss = nn.SmoothL1Loss()(torch.zeros(want.shape), got)
    torch.testing.assert_close(loss, F.smooth_l1_loss(torch.zeros(want.shape), want))
    assert got._value is None


def test_loss_to_another_shape_is_the_published_one() -> None:
    got, want = _targets()
    with pytest.warns(UserWarning, match="broadcasting"):
        loss = F.smooth_l1_loss(torch.ones(1, 1, 8), got)
    with pytest.warns(UserWarning, match="broadcasting"):
        assert torch.equal(loss, F.smooth_l1_loss(torch.ones(1, 1, 8), want))
    with pytest.raises(RuntimeError, match="negative values for beta"):
        F.smooth_l1_loss(torch.ones(want.shape), _targets()[0], beta=-1.0)


def test_features_that_need_a_gradient_are_not_deferred() -> None:
    integrations.accelerate(style)
    h = torch.randn(B, N, 8, requires_grad=True)
    assert type(style.F.layer_norm(h, (8,))) is torch.Tensor
    with torch.no_grad():
        assert type(style.F.layer_norm(h, (8,))) is DeferredTargets
    for other in (
        lambda: style.F.layer_norm(h[0], (8,)),
        lambda: style.F.layer_norm(h, (N, 8)),
        lambda: style.F.layer_norm(h, (8,), torch.ones(8)),
        lambda: style.F.layer_norm(h, (8,), bias=torch.ones(8)),
    ):
        with torch.no_grad():
            assert type(other()) is torch.Tensor
    with torch.inference_mode():
        assert type(style.F.layer_norm(h.detach().clone(), (8,))) is torch.Tensor


def test_features_changed_before_use_are_an_error() -> None:
    integrations.accelerate(style)
    h = torch.randn(B, N, 8)
    y = style.F.layer_norm(h, (8,))
    h.zero_()
    with pytest.raises(RuntimeError, match=r"changed in place after F\.layer_norm"):
        y.mean()
    _, masks = style.draw_masks(B, N, 7, 3)
    y = style.apply_masks(style.F.layer_norm(h, (8,)), masks)
    masks[0].zero_()
    with pytest.raises(RuntimeError, match="features or masks were changed in place"):
        F.smooth_l1_loss(torch.zeros(4 * B, 3, 8), y)


def test_targets_taken_before_a_change_do_not_follow_it() -> None:
    h = torch.randn(B, N, 8)
    _, masks = style.draw_masks(B, N, 7, 3)
    outs = []
    for accelerated in (False, True):
        if accelerated:
            integrations.accelerate(style)
        y = style.F.layer_norm(h, (8,))
        taken = style.apply_masks(y, masks)
        y.mul_(2.0)
        outs.append((taken + 0, y + 0, style.apply_masks(y, masks) + 0))
    for got, want in zip(*outs, strict=True):
        assert torch.equal(got, want)


def test_function_transforms_get_the_published_loss() -> None:
    deferred, published = _targets()
    z = torch.linspace(-2, 2, published.numel()).view(published.shape)
    got = torch.func.grad(lambda z: F.smooth_l1_loss(z, deferred))(z)
    assert torch.equal(got, torch.func.grad(lambda z: F.smooth_l1_loss(z, published))(z))


def test_features_are_freed_with_the_step() -> None:
    """Without the garbage collector, which knows nothing of an accelerator's memory."""
    integrations.accelerate(style)
    _, masks = style.draw_masks(B, N, 7, 3)
    z = torch.zeros(8 * B, 3, 8, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        for other_use in (False, True):
            h = torch.randn(B, N, 8)
            alive = weakref.ref(h)
            y = style.apply_masks(style.F.layer_norm(h, (8,)), masks)
            y = style.repeat_interleave_batch(y, B, repeat=2)
            if other_use:
                y.mean()
            loss = F.smooth_l1_loss(z, y)
            del h, y
            loss.backward()
            assert alive() is None
    finally:
        gc.enable()


def test_autocast_of_the_targets_is_that_of_their_moment() -> None:
    h = torch.randn(B, N, 8).bfloat16()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            want = F.layer_norm(h, (8,)) @ torch.eye(8, dtype=torch.bfloat16)
            integrations.accelerate(style)
            y = style.F.layer_norm(h, (8,))
            integrations.restore(style)
        assert torch.equal(y @ torch.eye(8, dtype=torch.bfloat16), want)
