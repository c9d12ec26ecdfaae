"""The target encoder: a copy, no gradient, and the hand formula of the moving average."""

from __future__ import annotations

import pytest
import torch

from njepa.models.encoder import build_encoder
from njepa.training.ema import ema_parameters, make_target, update_target
from njepa.training.module import TrainModule
from njepa.training.schedules import Schedules
from tests.support.tiny import make_batch, tiny_config


def test_target_is_an_fp32_copy_without_gradient():
    encoder = build_encoder(tiny_config())
    target = make_target(encoder)
    assert not target.training
    assert not any(p.requires_grad for p in target.parameters())
    assert encoder.blocks[0].attn.qkv.weight.requires_grad
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, target.state_dict()[name]), name
        assert value.data_ptr() != target.state_dict()[name].data_ptr()
    half = make_target(build_encoder(tiny_config()).bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_gradients_of_the_step_stay_out_of_the_target():
    config = tiny_config("ncjepa", vicreg={"on": "context_vs_target"})
    module, batch = TrainModule(config), make_batch(config)
    target = make_target(module.jepa.encoder)
    h = target(batch.images)
    assert not h.requires_grad
    h.requires_grad_()  # even then nothing may flow back
    module(batch, h)[0].backward()
    assert h.grad is None
    assert all(p.grad is None for p in target.parameters())


def test_hand_formula_over_several_steps():
    encoder = build_encoder(tiny_config())
    target = make_target(encoder)
    schedules = Schedules(tiny_config().optim, 5, 0)
    expected = [p.detach().double().clone() for p in ema_parameters(encoder)]
    table = target.pos_embed.clone()
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        m = schedules.at(step).momentum
        with torch.no_grad():
            for parameter in ema_parameters(encoder):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        update_target(target, ema_parameters(encoder), m)
        for i, parameter in enumerate(ema_parameters(encoder)):
            expected[i] = m * expected[i] + (1 - m) * parameter.detach().double()
    for got, want in zip(ema_parameters(target), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(target.pos_embed, table)
    assert len(expected) == len(list(encoder.parameters())) - 1


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_extreme_momenta(momentum: float):
    encoder = build_encoder(tiny_config())
    target, other = make_target(encoder), build_encoder(tiny_config(run={"seed": 1}))
    update_target(target, ema_parameters(other), momentum)
    winner = encoder if momentum == 1.0 else other
    for got, want in zip(ema_parameters(target), ema_parameters(winner), strict=True):
        assert torch.equal(got, want)


def test_small_changes_from_bf16_sources_survive():
    encoder = build_encoder(tiny_config())
    target = make_target(encoder)
    sources = [p.detach().bfloat16() for p in ema_parameters(encoder)]
    names = [name for name, _ in encoder.named_parameters() if name != "pos_embed"]
    norm = names.index("blocks.0.norm1.weight")  # all ones
    sources[norm] += 2**-7
    update_target(target, sources, 0.996)
    updated = target.get_parameter(names[norm])
    torch.testing.assert_close(updated, torch.full((32,), 1 + 0.004 / 128), rtol=0, atol=1e-7)
    assert (updated.bfloat16() == 1).all()  # a bf16 average would have lost it


def test_wrong_number_of_sources():
    encoder = build_encoder(tiny_config())
    target = make_target(encoder)
    with pytest.raises(ValueError, match=r"28 tensors.*got 27"):
        update_target(target, ema_parameters(encoder)[:-1], 0.9)
