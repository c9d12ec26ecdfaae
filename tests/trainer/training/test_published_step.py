"""The I-JEPA step against an independent implementation: same weights, images and masks."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.published.networks import PublishedEncoder, PublishedPredictor, published_loss
from njepa.training.ema import make_target
from njepa.training.engine import PlainEngine
from njepa.training.module import TrainModule
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, training_step
from tests.support.tiny import SIDE, make_batch, normalised, tiny_config

CONFIG = tiny_config("ijepa")


def published_twin(module: TrainModule):
    encoder = PublishedEncoder(SIDE, patch=8, width=32, depth=2, heads=2)
    predictor = PublishedPredictor(SIDE, encoder_width=32, width=24, depth=2, heads=2)
    # The tables are not copied over but compared: both sides compute their own.
    torch.testing.assert_close(module.jepa.encoder.pos_embed, encoder.pos_embed, rtol=0, atol=1e-7)
    torch.testing.assert_close(
        module.jepa.predictor.predictor_pos_embed, predictor.predictor_pos_embed, rtol=0, atol=1e-7
    )
    encoder.load_state_dict(module.jepa.encoder.state_dict())
    predictor.load_state_dict(module.jepa.predictor.state_dict())
    return encoder, predictor


def enlarge(module: TrainModule) -> None:
    """Weights at which attention is far from uniform, or its part of the test would be weak."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
                if "bias" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["fp32", "fp64"]
)
def test_loss_and_all_gradients(dtype: torch.dtype, tolerance: float):
    module = TrainModule(CONFIG)
    enlarge(module)
    encoder, predictor = (part.to(dtype) for part in published_twin(module))
    module.to(dtype)
    # A target that differs from the context encoder, as it does after the first step.
    generator = torch.Generator().manual_seed(3)
    published_target = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in published_target.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(dtype))
    target = copy.deepcopy(module.jepa.encoder)
    target.load_state_dict(published_target.state_dict())

    batch = make_batch(CONFIG)
    images = normalised(batch.images, CONFIG, dtype)
    with torch.no_grad():
        h = target(batch.images)
    loss, _ = module(batch, h)
    loss.backward()
    expected = published_loss(
        encoder, predictor, published_target, images, [batch.masks.context_idx],
        list(batch.masks.target_idx.unbind(1)),
    )  # fmt: skip
    expected.backward()

    assert loss.dtype == dtype
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    for ours, theirs in ((module.jepa.encoder, encoder), (module.jepa.predictor, predictor)):
        gradients = dict(ours.named_parameters())
        assert gradients.keys() == dict(theirs.named_parameters()).keys()
        for name, parameter in theirs.named_parameters():
            got = gradients[name].grad
            if not parameter.requires_grad:
                assert got is None
                continue
            error = (got - parameter.grad).norm() / parameter.grad.norm()
            assert error <= tolerance, (name, error.item())


def test_five_updates():
    """Optimizer groups and EMA included: the losses stay together."""
    module = TrainModule(CONFIG)
    encoder, predictor = published_twin(module)
    target, published_target = make_target(module.jepa.encoder), copy.deepcopy(encoder)
    state = TrainState(PlainEngine(module, CONFIG.optim, torch.device("cpu")), target)
    rates = Rates(lr=1e-3, weight_decay=0.04, momentum=0.9)
    named = [*encoder.named_parameters(), *predictor.named_parameters()]
    published_optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if "bias" not in n and p.dim() != 1]},
            {"params": [p for n, p in named if "bias" in n or p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        weight_decay=0.04,
    )
    losses = []
    for step in range(5):
        batch = make_batch(CONFIG, step=step)
        (seen,) = training_step(state, [batch], rates).micro_batches
        loss = seen.metrics["loss"]
        expected = published_loss(
            encoder, predictor, published_target, normalised(batch.images, CONFIG),
            [batch.masks.context_idx],
            list(batch.masks.target_idx.unbind(1)),
        )  # fmt: skip
        published_optimizer.zero_grad()
        expected.backward()
        published_optimizer.step()
        with torch.no_grad():
            for q, k in zip(encoder.parameters(), published_target.parameters(), strict=True):
                k.mul_(0.9).add_(q, alpha=0.1)
        assert abs(loss.item() - expected.item()) <= 2e-6 * expected.item(), step
        losses.append(loss.item())
    assert losses[-1] < losses[0]
