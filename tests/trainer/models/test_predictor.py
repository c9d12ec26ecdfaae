"""The predictor: row order, queries with and without noise, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from njepa_kernels import NoiseKey, philox_normal
from torch import Tensor

from njepa.config import Config, ConfigError
from njepa.data.batch import Batch, Masks, Noise
from njepa.draws.streams import stream_seed
from njepa.models.predictor import Predictor, build_predictor
from tests.support.tiny import N_BLOCKS, N_CONTEXT, N_TARGETS, make_batch, rows_of, tiny_config

BATCH, STEP = 4, 3


def context(batch: int = BATCH) -> Tensor:
    return torch.randn(batch, N_CONTEXT, 32, generator=torch.Generator().manual_seed(2))


def first_tokens(predictor: Predictor, *args: Any, **options: Any) -> Tensor:
    """What enters the first block, [M*B, Kc+Kt, d]."""
    seen: list[Tensor] = []
    hook = predictor.predictor_blocks[0].register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    predictor(*args, **options)
    hook.remove()
    return seen[0]


def noisy_tokens(config: Config, batch: Batch) -> tuple[Predictor, Tensor]:
    """A predictor and its noised queries as [B, M, Kt, d]."""
    predictor = build_predictor(config, "predictor")
    tokens = first_tokens(predictor, context(), batch.masks, batch.noise)
    queries = tokens[:, N_CONTEXT:].unflatten(0, (N_BLOCKS, BATCH)).transpose(0, 1)
    return predictor, queries.detach()


def test_published_names():
    predictor = build_predictor(tiny_config(), "predictor")
    assert {name.split(".")[0] for name, _ in predictor.named_parameters()} == {
        "predictor_embed", "mask_token", "predictor_pos_embed", "predictor_blocks",
        "predictor_norm", "predictor_proj",
    }  # fmt: skip


def test_rows_are_block_major():
    """Row m*B + b is what block m of image b gives alone."""
    predictor, batch = (
        build_predictor(tiny_config(), "predictor"),
        make_batch(tiny_config()),
    )
    z = context()
    rows = predictor(z, batch.masks)
    assert rows.shape == (N_BLOCKS * BATCH, N_TARGETS, 32)
    for m in range(N_BLOCKS):
        for b in range(BATCH):
            one = slice(b, b + 1)
            masks = Masks(batch.masks.context_idx[one], batch.masks.target_idx[one, m : m + 1])
            alone = predictor(z[one], masks)
            torch.testing.assert_close(rows[m * BATCH + b], alone[0], rtol=1e-5, atol=1e-6)


def test_clean_tokens():
    predictor, batch = (
        build_predictor(tiny_config(), "predictor"),
        make_batch(tiny_config()),
    )
    z = context()
    tokens = first_tokens(predictor, z, batch.masks)
    pos = predictor.predictor_pos_embed[0]
    for m in range(N_BLOCKS):
        for b in range(BATCH):
            kept = predictor.predictor_embed(z[b]) + pos[batch.masks.context_idx[b]]
            queries = predictor.mask_token[0] + pos[batch.masks.target_idx[b, m]]
            torch.testing.assert_close(tokens[m * BATCH + b], torch.cat((kept, queries)))


# noise

SPACES = ["predictor", "encoder_tied"]


@pytest.mark.parametrize("draw", ["per_block", "shared"])
@pytest.mark.parametrize("space", SPACES)
def test_noised_queries(space: str, draw: str):
    """mask token + psi + sigma n, with n of the counter-based stream, keyed by the step."""
    config = tiny_config("njepa", noise={"space": space, "draw": draw})
    batch = make_batch(config, step=STEP)
    predictor, queries = noisy_tokens(config, batch)
    width = 32 if space == "encoder_tied" else 24
    seed = stream_seed(config.run.seed, "noise")
    key = NoiseKey(seed, STEP, batch.sample_ids, draw == "shared")
    with torch.no_grad():
        noise = philox_normal(key, batch.masks.target_idx, width)
        if space == "encoder_tied":
            noise = noise @ predictor.predictor_embed.weight.T
        psi = predictor.predictor_pos_embed[0][batch.masks.target_idx]
        expected = predictor.mask_token[0] + psi + batch.noise.sigma[..., None, None] * noise
    torch.testing.assert_close(queries, expected, rtol=1e-5, atol=2e-6)
    assert (queries - predictor.mask_token[0] - psi).abs().max() > 0.05


@pytest.mark.parametrize("draw", ["per_block", "shared"])
@pytest.mark.parametrize("space", SPACES)
def test_a_shared_draw_gives_a_patch_the_same_noise_in_all_blocks(space: str, draw: str):
    config = tiny_config("njepa", noise={"space": space, "draw": draw})
    batch = make_batch(config, sigmas=(0.5,))
    same = batch.masks.target_idx[:, :1].expand(-1, N_BLOCKS, -1).clone()
    same[:, 1] = same[:, 1].flip(-1)  # the place inside the block does not matter either
    _, queries = noisy_tokens(config, batch._replace(masks=batch.masks._replace(target_idx=same)))
    queries[:, 1] = queries[:, 1].flip(1)
    gap = (queries - queries[:, :1]).abs().amax((-1, -2))
    images = (queries[0] - queries[1]).abs().max()
    if draw == "shared":
        torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-6)
    else:
        assert (gap[:, 1:] > 0.05).all()
    assert images > 0.05


def test_variance_of_the_noise_is_sigma_squared_at_each_sigma():
    config = tiny_config("njepa", model={"predictor": {"width": 384, "depth": 1, "heads": 2}})
    batch = make_batch(config)
    predictor, queries = noisy_tokens(config, batch)
    psi = predictor.predictor_pos_embed[0][batch.masks.target_idx]
    residual = (queries - predictor.mask_token[0] - psi).detach()
    for sigma in batch.noise.sigma.unique().tolist():
        values = residual[batch.noise.sigma == sigma]
        error = 5 * (2 / values.numel()) ** 0.5  # five standard errors of a variance
        assert abs(values.var().item() / sigma**2 - 1) < error
        assert abs(values.mean().item()) < 5 * sigma / values.numel() ** 0.5


@pytest.mark.parametrize("draw", ["per_block", "shared"])
@pytest.mark.parametrize("space", SPACES)
def test_no_noise_at_sigma_zero(space: str, draw: str):
    config = tiny_config("njepa", noise={"space": space, "draw": draw})
    predictor, batch = build_predictor(config, "predictor"), make_batch(config, sigmas=(0.0,))
    z = context()
    noised = predictor(z, batch.masks, batch.noise)
    clean = predictor(z, batch.masks)
    if space == "predictor":
        assert torch.equal(noised, clean)
    else:  # the context passes through a wider matrix product, which may round differently
        torch.testing.assert_close(noised, clean, rtol=1e-6, atol=1e-6)


def test_noise_depends_on_step_and_sample_only():
    config = tiny_config("njepa")
    predictor, batch = build_predictor(config, "predictor"), make_batch(config, step=STEP)
    z, (sigma, key) = context(), batch.noise
    tokens = first_tokens(predictor, z, batch.masks, batch.noise)
    second = rows_of(batch, slice(2, None))
    half = first_tokens(predictor, z[2:], second.masks, second.noise)
    rows = tokens.unflatten(0, (N_BLOCKS, BATCH))[:, 2:]
    torch.testing.assert_close(half.unflatten(0, (N_BLOCKS, 2)), rows, rtol=0, atol=1e-6)
    later = Noise(sigma, key._replace(step=4))
    assert not torch.allclose(first_tokens(predictor, z, batch.masks, later), tokens)
    other = Noise(sigma, key._replace(sample_ids=key.sample_ids + 1))
    moved = first_tokens(predictor, z, batch.masks, other)
    assert not torch.allclose(moved, tokens)
    assert torch.equal(moved[:, :N_CONTEXT], tokens[:, :N_CONTEXT])


def test_tied_noise_trains_the_context_projection_but_not_its_bias():
    config = tiny_config("njepa", noise={"space": "encoder_tied"})
    predictor, batch = build_predictor(config, "predictor"), make_batch(config)
    tokens = first_tokens(predictor, context(), batch.masks, batch.noise)
    tokens[:, N_CONTEXT:].square().sum().backward()
    assert predictor.predictor_embed.weight.grad.abs().max() > 1
    assert predictor.predictor_embed.bias.grad.abs().max() < 1e-4


def test_position_table_is_not_written_to():
    config = tiny_config("njepa", noise={"space": "encoder_tied"})
    predictor, batch = build_predictor(config, "predictor"), make_batch(config)
    before = predictor.predictor_pos_embed.clone()
    predictor(context(), batch.masks, batch.noise, with_clean=True)
    assert torch.equal(predictor.predictor_pos_embed, before)
    assert not predictor.predictor_pos_embed.requires_grad


# Both predictions in one pass


def with_own_token(config: Config) -> Predictor:
    predictor = build_predictor(config, "predictor", noise_mask_token=True)
    assert not torch.equal(predictor.noise_mask_token, predictor.mask_token)
    return predictor


@pytest.mark.parametrize("own_token", [False, True], ids=["one-token", "two-tokens"])
@pytest.mark.parametrize("kind", ["per_block", "shared"])
@pytest.mark.parametrize("space", SPACES)
def test_with_clean_equals_two_calls(space: str, kind: str, own_token: bool):
    part = {"width": 24, "depth": 2, "heads": 2, "context": kind}
    config = tiny_config("njepa", noise={"space": space}, model={"predictor": part})
    batch, results = make_batch(config), []
    weight = torch.randn(2 * N_BLOCKS * BATCH, N_TARGETS, 32,
                         generator=torch.Generator().manual_seed(5))  # fmt: skip
    for together in (True, False):
        predictor = build_predictor(config, "predictor", noise_mask_token=own_token)
        z = context().requires_grad_()
        args = (z, batch.masks, batch.noise)
        if together:
            both = predictor(*args, with_clean=True)
        else:
            both = torch.cat((predictor(*args[:2]), predictor(*args)))
        (both * weight).sum().backward()
        trained = {n: p.grad for n, p in predictor.named_parameters() if p.requires_grad}
        results.append({"both": both.detach(), "z": z.grad, **trained})
    clean, noised = results[0]["both"].chunk(2)
    assert (clean - noised).abs().max() > 1e-3
    assert ("noise_mask_token" in results[0]) == own_token
    for name, expected in results[1].items():
        assert (results[0][name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_the_token_of_noised_queries_reaches_them_alone():
    config = tiny_config("njepa")
    predictor, batch = with_own_token(config), make_batch(config, sigmas=(0.0,))
    args = (context(), batch.masks, batch.noise)
    tokens = first_tokens(predictor, *args, with_clean=True).detach()
    clean, noised = tokens.chunk(2)
    assert torch.equal(noised[:, :N_CONTEXT], clean[:, :N_CONTEXT])
    torch.testing.assert_close(
        noised[:, N_CONTEXT:] - clean[:, N_CONTEXT:],
        (predictor.noise_mask_token - predictor.mask_token).detach().expand_as(
            clean[:, N_CONTEXT:]
        ),
        rtol=0, atol=1e-6,
    )  # fmt: skip
    for call, own in ((args[:2], False), (args, True)):
        predictor.zero_grad()
        predictor(*call).square().sum().backward()
        assert (predictor.noise_mask_token.grad is not None) == own
        assert (predictor.mask_token.grad is not None) != own


# Weights and sizes


def test_initial_weights():
    config = tiny_config(model={"predictor": {"width": 128, "depth": 1, "heads": 2}})
    predictor = build_predictor(config, "predictor")
    assert 0.015 < predictor.mask_token.std() < 0.025
    assert abs(predictor.predictor_proj.weight.std().item() - 0.02) < 0.001
    assert torch.count_nonzero(predictor.predictor_embed.bias) == 0
    other = build_predictor(config, "noise_predictor")
    assert not torch.equal(other.mask_token, predictor.mask_token)


def test_a_second_token_starts_as_that_of_a_second_predictor_and_moves_nothing_else():
    config = tiny_config("njepa", model={"depth_rescaled_init": True})
    plain, own = build_predictor(config, "predictor"), with_own_token(config)
    second = build_predictor(config, "noise_predictor")
    assert torch.equal(own.noise_mask_token, second.mask_token)
    mine = own.state_dict()
    assert mine.keys() - plain.state_dict().keys() == {"noise_mask_token"}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, mine[name]), name


def test_heads_default_to_the_encoders():
    config = tiny_config(model={"heads": 4, "predictor": {"width": 24, "depth": 1}})
    predictor = build_predictor(config, "predictor")
    assert predictor.predictor_blocks[0].attn.num_heads == 4
    bad = tiny_config(model={"heads": 4, "predictor": {"width": 28, "depth": 1, "heads": 3}})
    with pytest.raises(ConfigError, match=r"model.predictor.width=28.*heads=3"):
        build_predictor(bad, "predictor")
