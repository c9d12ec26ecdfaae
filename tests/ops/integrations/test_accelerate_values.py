"""accelerate on published-style code: the loss, gradients and predictions it had."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from njepa_kernels import integrations
from njepa_kernels.testing import assert_within_baseline

from bench.published import script as style
from tests.support.accelerated import (
    B,
    N,
    accelerate_all,
    each_contexts,
    orders,
    setup,
    step_values,
)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_contexts
def test_loss_and_gradients_of_a_step(n_contexts: int, dtype: torch.dtype, impl: str) -> None:
    encoder, predictor, images, *masks = setup(n_contexts, dtype)
    plain = [step_values(encoder, predictor, *batch) for batch in orders(images, *masks)]
    wide = [copy.deepcopy(m).double() for m in (encoder, predictor)]
    exact = step_values(*wide, images.double(), *masks)
    accelerate_all(encoder, predictor, impl)
    ours = step_values(encoder, predictor, images, *masks)
    assert ours.keys() == plain[0].keys()
    assert len(ours) > 50
    for name, value in ours.items():
        assert value.dtype == plain[0][name].dtype, name
        eager = max((p[name] for p in plain), key=lambda x: (x.double() - exact[name]).abs().max())
        assert_within_baseline(value, eager, exact[name], dtype, name)


@each_contexts
def test_step_in_float64(n_contexts: int) -> None:
    encoder, predictor, images, *masks = setup(n_contexts, torch.float64)
    plain = step_values(encoder, predictor, images, *masks)
    accelerate_all(encoder, predictor)
    for name, value in step_values(encoder, predictor, images, *masks).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-15)


@each_contexts
def test_step_under_autocast(n_contexts: int) -> None:
    encoder, predictor, images, *masks = setup(n_contexts)
    plain = step_values(encoder, predictor, images, *masks, amp=True)
    exact = step_values(
        *[copy.deepcopy(m).double() for m in (encoder, predictor)], images.double(), *masks
    )
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(images, masks[0])
        p = predictor(z, *masks)
    accelerate_all(encoder, predictor)
    ours = step_values(encoder, predictor, images, *masks, amp=True)
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype, name
        assert_within_baseline(value, plain[name], exact[name], torch.bfloat16, name)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(images, masks[0]).dtype == z.dtype
        assert predictor(z, *masks).dtype == p.dtype


@each_contexts
def test_forward_is_bit_equal_in_fp32(n_contexts: int) -> None:
    """Only additions in fp32 are moved, none is changed."""
    encoder, predictor, images, masks_enc, masks_pred = setup(n_contexts)
    z = encoder(images, masks_enc)
    p = predictor(z, masks_enc, masks_pred)
    integrations.accelerate(encoder)
    integrations.accelerate(predictor)
    assert torch.equal(encoder(images, masks_enc), z)
    assert torch.equal(predictor(z, masks_enc, masks_pred), p)
    assert p.shape == (4 * n_contexts * B, 3, 32)


def test_masks_may_be_tensors() -> None:
    encoder, predictor, images, (context,), (target, *_) = setup()
    z = encoder(images, context)
    p = predictor(z, context, target)
    integrations.accelerate(encoder)
    integrations.accelerate(predictor)
    assert torch.equal(encoder(images, context), z)
    assert torch.equal(predictor(z, context, target), p)


def test_several_steps_with_optimizer_and_average() -> None:
    losses = []
    for accelerated in (False, True):
        encoder, predictor, images, *masks = setup(2)
        target = copy.deepcopy(encoder)
        if accelerated:
            accelerate_all(encoder, predictor)
        parameters = [*encoder.parameters(), *predictor.parameters()]
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3)
        step = style.make_step(encoder, predictor, target, optimizer, momentum=0.9)
        losses.append([float(step(images, *masks)) for _ in range(8)])
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiled_without_a_graph_break(impl: Any) -> None:
    torch.compiler.reset()
    encoder, predictor, images, *masks = setup(2)
    z = encoder(images, masks[0])
    p = predictor(z, *masks)
    integrations.accelerate(encoder, impl)
    integrations.accelerate(predictor, impl)
    compiled = [torch.compile(m, backend="aot_eager", fullgraph=True) for m in (encoder, predictor)]
    torch.testing.assert_close(compiled[0](images, masks[0]), z)
    out = compiled[1](z.detach(), *masks)
    torch.testing.assert_close(out, p)
    out.square().mean().backward()
    assert predictor.mask_token.grad.abs().max() > 0


def test_compiled_script_is_the_published_one() -> None:
    torch.compiler.reset()
    h, z = torch.randn(B, N, 8), torch.randn(4 * B, 3, 8)
    _, masks = style.draw_masks(B, N, 7, 3)

    def loss() -> torch.Tensor:
        targets = style.apply_masks(style.F.layer_norm(h, (8,)), masks)
        return style.F.smooth_l1_loss(z, targets)

    want = loss()
    integrations.accelerate(style)
    torch.testing.assert_close(loss(), want)
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(), want)


@each_contexts
def test_prediction_loss(n_contexts: int) -> None:
    h = torch.randn(B, N, 8, dtype=torch.float64)
    _, masks = style.draw_masks(B, N, 7, 3)
    z = torch.randn(4 * n_contexts * B, 3, 8, dtype=torch.float64)
    targets = style.apply_masks(F.layer_norm(h, (8,)), masks)
    targets = style.repeat_interleave_batch(targets, B, repeat=n_contexts)
    got = integrations.prediction_loss(z, h, masks, n_contexts, beta=0.7)
    torch.testing.assert_close(got, F.smooth_l1_loss(z, targets, beta=0.7))
    one = integrations.prediction_loss(z[:B], h, masks[0])
    torch.testing.assert_close(one, F.smooth_l1_loss(z[:B], targets[:B]))


def test_prediction_loss_refuses() -> None:
    h, mask, z = torch.zeros(2, 5, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)
    for args, message in (
        ((z, h[0], mask), r"h must be a torch.Tensor \[B,N,D\], got \[5, 4\]"),
        ((z, h, [mask, mask[:, :2]]), r"masks_pred must be int64 \[2, Kt\] with one Kt.*\[2, 2\]"),
        ((z, h, [3]), r"got \['int'\]"),
        ((z, h, mask, 0), "n_contexts must be at least 1, got 0"),
        ((z, h, mask, 2), r"jepa_loss: pred must be \[M\*B,Kt,D\] = \[4, 3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            integrations.prediction_loss(*args)
