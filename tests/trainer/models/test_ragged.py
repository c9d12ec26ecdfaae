"""Ragged masks: a batch is what its images are one by one, however their tokens are laid out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from njepa.config import Config
from njepa.data.batch import Batch, Lengths, Masks
from njepa.models.attention import Attention, Sequences
from njepa.models.jepa import JepaOutput
from njepa.objectives import objective
from njepa.training.ema import make_target
from njepa.training.module import TrainModule
from tests.support.packed_attention import ATTENTION
from tests.support.tiny import make_batch, rows_of, tiny_config

COUNTS = (10, 3, 7, 10, 1)


def ragged_batch(config: Config, counts: tuple[int, ...] = COUNTS, padding: int = 0) -> Batch:
    batch = make_batch(config, batch=len(counts))
    own = torch.tensor(counts)
    place = torch.arange(batch.masks.context_idx.shape[1])
    context_idx = batch.masks.context_idx.where(place < own[:, None], padding)
    masks = batch.masks._replace(context_idx=context_idx, context_lengths=Lengths(counts, own))
    return batch._replace(masks=masks)


def image_alone(batch: Batch, b: int) -> Batch:
    """Image b with its own tokens and nothing else."""
    assert batch.masks.context_lengths is not None
    n, one = batch.masks.context_lengths.counts[b], rows_of(batch, slice(b, b + 1))
    return one._replace(masks=Masks(one.masks.context_idx[:, :n], one.masks.target_idx))


def features(module: TrainModule, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return make_target(module.jepa.encoder)(batch.images)


def by_loop(config: Config, batch: Batch) -> tuple[torch.Tensor, dict, TrainModule]:
    """Loss, metrics and module: every image through the dense network on its own."""
    module, outputs = TrainModule(config), []
    for b in range(len(batch.images)):
        one = image_alone(batch, b)
        outputs.append(module.jepa(one.images, one.masks, one.noise))

    def rows(name: str) -> torch.Tensor | None:
        """[M*1, Kt, D] of each image to [M*B, Kt, D], row m*B + b."""
        parts = [getattr(output, name) for output in outputs]
        return None if parts[0] is None else torch.stack(parts, dim=1).flatten(0, 1)

    whole = JepaOutput(
        # One token per image, its mean, so that the mean over tokens is that of the image alone.
        torch.cat([output.context.mean(dim=1, keepdim=True) for output in outputs]),
        rows("clean"),
        rows("noised"),
    )
    h = features(module, batch)
    dense = batch.masks._replace(context_lengths=None)
    losses = objective(config, whole, h, dense, module.jepa.projector)
    return losses.total, losses.metrics, module


def shared_context(method: str, **sections: dict[str, Any]) -> Config:
    predictor = {"width": 24, "depth": 2, "heads": 2, "context": "shared"}
    return tiny_config(method, model={"predictor": predictor}, **sections)


CASES = {
    "ijepa": tiny_config("ijepa"),
    "cjepa": tiny_config("cjepa", vicreg={"weight": 0.5}),
    "njepa": tiny_config("njepa"),
    "ncjepa": tiny_config("ncjepa", vicreg={"weight": 0.5}),
    "context": tiny_config("ncjepa", vicreg={"weight": 0.5, "on": "context_vs_target"}),
    "tied": tiny_config("njepa", noise={"space": "encoder_tied", "mask_token": "shared"}),
    "one": tiny_config("njepa", noise={"predictors": "shared", "draw": "shared"}),
    "single": tiny_config("njepa", noise={"predictors": "single"}),
    "shared": shared_context("ijepa"),
    "shared-one": shared_context("ncjepa", vicreg={"weight": 0.5}, noise={"predictors": "shared"}),
}


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("name", CASES)
def test_a_batch_equals_its_images_one_by_one(name: str, kind: str):
    config = CASES[name]
    batch = ragged_batch(config)
    expected, expected_metrics, alone = by_loop(config, batch)
    expected.backward()
    module = TrainModule(config, attention=ATTENTION[kind])
    loss, metrics = module(batch, features(module, batch))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        torch.testing.assert_close(metrics[key], value, rtol=1e-4, atol=1e-6, msg=key)
    scale = max(p.grad.norm() for p in alone.parameters() if p.requires_grad)
    for key, parameter in alone.named_parameters():
        if parameter.requires_grad:
            error = (module.get_parameter(key).grad - parameter.grad).norm()
            assert error <= 2e-4 * parameter.grad.norm() + 1e-6 * scale, (key, error)
    if config.method in ("ijepa", "njepa"):  # a mean over images: their losses, equally weighted
        images = [image_alone(batch, b) for b in range(len(COUNTS))]
        losses = [alone(one, features(alone, one))[0] for one in images]
        torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=2e-5, atol=1e-6)


def test_the_loop_is_worth_comparing_with():
    """Padding that is attended to, or averaged, shows."""
    for name in ("ijepa", "context", "shared"):
        batch = ragged_batch(CASES[name])
        module = TrainModule(CASES[name])
        right = module(batch, features(module, batch))[0]
        wrong = module(
            batch._replace(masks=batch.masks._replace(context_lengths=None)),
            features(module, batch),
        )[0]
        assert (right - wrong).abs() > 1e-5 * right, name


@pytest.mark.parametrize("kind", ATTENTION)
def test_padding_has_no_influence_and_no_gradient(kind: str):
    config = tiny_config("cjepa", vicreg={"weight": 0.5, "on": "context_vs_target"})
    results = []
    for padding in (0, 17):
        batch = ragged_batch(config, padding=padding)
        module = TrainModule(config, attention=ATTENTION[kind])
        embedded: list[torch.Tensor] = []
        module.jepa.encoder.patch_embed.proj.register_forward_hook(
            lambda _, inputs, output, into=embedded: into.append(output)
        )
        h = features(module, batch)
        loss, _ = module(batch, h)
        embedded[-1].retain_grad()
        loss.backward()
        per_patch = embedded[-1].grad.abs().sum(-1)
        own = torch.arange(per_patch.shape[1]) < torch.tensor(COUNTS)[:, None]
        assert torch.equal(per_patch > 0, own)
        results.append((loss, {n: p.grad for n, p in module.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", ATTENTION)
def test_encoded_padding_is_zero(kind: str):
    config = tiny_config()
    batch, module = ragged_batch(config), TrainModule(config, attention=ATTENTION[kind])
    z = module.jepa.encoder(batch.images, batch.masks.context_idx, batch.masks.context_lengths)
    tokens = torch.arange(z.shape[1]) < torch.tensor(COUNTS)[:, None]
    assert torch.equal(z.abs().sum(-1) > 0, tokens)


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("name", ["ijepa", "ncjepa", "context", "shared"])
def test_equal_counts_are_the_dense_step_bit_for_bit(name: str, kind: str):
    """With SDPA for dense sequences, as ``auto`` has it."""
    config = CASES[name]
    ragged = ragged_batch(config, counts=(10,) * 4)
    attention = Attention(ragged=ATTENTION[kind].ragged)
    results = []
    for batch in (ragged, ragged._replace(masks=ragged.masks._replace(context_lengths=None))):
        module = TrainModule(config, attention=attention)
        loss, _ = module(batch, features(module, batch))
        loss.backward()
        results.append((loss, [p.grad for p in module.parameters() if p.requires_grad]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


class Plain:
    """A packing kernel for tensors without values."""

    name, packs = "plain", True

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Sequences):
        return q + (k + v).mean(dim=(0, 1))  # queries may be fewer than keys


@pytest.mark.parametrize("attention", [Attention(), Attention(ragged=Plain())], ids=["pad", "pack"])
@pytest.mark.parametrize("name", ["ncjepa", "context", "tied", "one", "shared-one"])
def test_no_value_is_read_on_the_host(
    name: str, attention: Attention, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    config = CASES[name]
    module, batch = TrainModule(config, attention=attention).to("meta"), ragged_batch(config)
    loss, metrics = module(batch.to("meta"), torch.empty(len(COUNTS), 36, 32, device="meta"))
    loss.backward()
    assert {value.device.type for value in (loss, *metrics.values())} == {"meta"}


@pytest.mark.parametrize("kind", ATTENTION)
def test_bf16_autocast(kind: str):
    """As close to fp32 as the dense network is on images of its own."""
    config = tiny_config("ijepa")
    batch = ragged_batch(config)
    exact = by_loop(config, batch)[0]
    module = TrainModule(config, attention=ATTENTION[kind])
    with torch.autocast("cpu", torch.bfloat16):
        h = features(module, batch)
        loss, _ = module(batch, h)
        near = by_loop(config, batch)[0]
    loss.backward()
    assert (loss - exact).abs() <= 2 * (near - exact).abs() + 2**-8 * exact
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
