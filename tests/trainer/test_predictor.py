"""The predictor: row order, queries with and without noise, and its options."""

from __future__ import annotations

import pytest
import torch
from njepa_kernels import philox_normal
from tiny import N_BLOCKS, N_CONTEXT, N_TARGETS, make_batch, tiny_config

from njepa.config import Config, ConfigError
from njepa.models.positions import sincos
from njepa.models.predictor import Predictor, build_predictor
from njepa.randomness import stream_seed

BATCH = 4


def context(batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, N_CONTEXT, 32, generator=torch.Generator().manual_seed(2))


def first_tokens(predictor: Predictor, *args: object) -> torch.Tensor:
    """What enters the first block, [M*B, Kc+Kt, d]."""
    seen: list[torch.Tensor] = []
    hook = predictor.predictor_blocks[0].register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    predictor(*args)
    hook.remove()
    return seen[0]


def noisy_tokens(config: Config, step: int = 3) -> tuple[Predictor, torch.Tensor]:
    """A noisy predictor and its queries as [B, M, Kt, d]."""
    predictor, batch = build_predictor(config, "noise_predictor", noisy=True), make_batch(config)
    tokens = first_tokens(
        predictor, context(), batch.context_idx, batch.target_idx, batch.sigma,
        batch.sample_ids, step,
    )  # fmt: skip
    queries = tokens[:, N_CONTEXT:].unflatten(0, (N_BLOCKS, BATCH)).transpose(0, 1)
    return predictor, queries.detach()


def test_published_names():
    predictor = build_predictor(tiny_config(), "predictor", noisy=False)
    assert {name.split(".")[0] for name, _ in predictor.named_parameters()} == {
        "predictor_embed", "mask_token", "predictor_pos_embed", "predictor_blocks",
        "predictor_norm", "predictor_proj",
    }  # fmt: skip


def test_rows_are_block_major():
    """Row m*B + b is what block m of image b gives alone."""
    predictor, batch = (
        build_predictor(tiny_config(), "predictor", noisy=False),
        make_batch(tiny_config()),
    )
    z = context()
    rows = predictor(z, batch.context_idx, batch.target_idx)
    assert rows.shape == (N_BLOCKS * BATCH, N_TARGETS, 32)
    for m in range(N_BLOCKS):
        for b in range(BATCH):
            one = slice(b, b + 1)
            alone = predictor(z[one], batch.context_idx[one], batch.target_idx[one, m : m + 1])
            torch.testing.assert_close(rows[m * BATCH + b], alone[0], rtol=1e-5, atol=1e-6)


def test_clean_tokens():
    predictor, batch = (
        build_predictor(tiny_config(), "predictor", noisy=False),
        make_batch(tiny_config()),
    )
    z = context()
    tokens = first_tokens(predictor, z, batch.context_idx, batch.target_idx)
    pos = predictor.predictor_pos_embed[0]
    for m in range(N_BLOCKS):
        for b in range(BATCH):
            kept = predictor.predictor_embed(z[b]) + pos[batch.context_idx[b]]
            queries = predictor.mask_token[0] + pos[batch.target_idx[b, m]]
            torch.testing.assert_close(tokens[m * BATCH + b], torch.cat((kept, queries)))


def _mix(kind: str, psi: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    noised = psi + sigma * noise
    scale = {
        "ve": torch.ones_like(sigma),
        "vp": (1 + sigma**2) ** -0.5,
        "edm": 0.5**0.5 / (sigma**2 + 0.5) ** 0.5,
    }
    return scale[kind] * noised


@pytest.mark.parametrize("mix", ["ve", "vp", "edm"])
@pytest.mark.parametrize("level_map", ["per_block", "per_token"])
@pytest.mark.parametrize("space", ["predictor", "encoder_tied"])
def test_noised_queries(mix: str, level_map: str, space: str):
    config = tiny_config("njepa", noise={"mix": mix, "map": level_map, "space": space})
    predictor, queries = noisy_tokens(config, step=3)
    batch, seed = make_batch(config), stream_seed(config.run.seed, "noise")
    with torch.no_grad():
        sigma = batch.sigma.view(*batch.sigma.shape, *([1] * (4 - batch.sigma.dim())))
        width = 32 if space == "encoder_tied" else 24
        noise = philox_normal(seed, 3, batch.sample_ids, batch.target_idx, width)
        if space == "encoder_tied":
            noise = noise @ predictor.predictor_embed.weight.T
        psi = predictor.predictor_pos_embed[0][batch.target_idx]
        expected = predictor.mask_token[0] + _mix(mix, psi, sigma, noise)
    torch.testing.assert_close(queries, expected, rtol=1e-5, atol=2e-6)
    assert (queries - predictor.mask_token[0] - psi).abs().max() > 0.05


def test_variance_of_the_noise_is_sigma_squared_at_each_level():
    config = tiny_config("njepa", model={"predictor": {"width": 384, "depth": 1, "heads": 2}})
    predictor, queries = noisy_tokens(config)
    batch = make_batch(config)
    residual = (
        queries - predictor.mask_token[0] - predictor.predictor_pos_embed[0][batch.target_idx]
    ).detach()
    for level in range(4):
        values = residual[batch.levels == level]
        sigma = batch.sigma[batch.levels == level][0].item()
        error = 5 * (2 / values.numel()) ** 0.5  # five standard errors of a variance
        assert abs(values.var().item() / sigma**2 - 1) < error


@pytest.mark.parametrize("space", ["predictor", "encoder_tied"])
@pytest.mark.parametrize("mix", ["ve", "vp", "edm"])
def test_no_noise_at_sigma_zero(space: str, mix: str):
    config = tiny_config("njepa", noise={"space": space, "mix": mix})
    predictor, batch = build_predictor(config, "predictor", noisy=True), make_batch(config)
    args = (context(), batch.context_idx, batch.target_idx)
    noised = predictor(*args, torch.zeros_like(batch.sigma), batch.sample_ids, 1)
    if space == "predictor":
        assert torch.equal(noised, predictor(*args))
    else:  # the context passes through a wider matrix product, which may round differently
        torch.testing.assert_close(noised, predictor(*args), rtol=1e-6, atol=1e-6)


def test_noise_depends_on_step_and_sample_only():
    config = tiny_config("njepa")
    predictor, batch = build_predictor(config, "predictor", noisy=True), make_batch(config)
    args = (context(), batch.context_idx, batch.target_idx, batch.sigma, batch.sample_ids)
    tokens = first_tokens(predictor, *args, 3)
    half = first_tokens(predictor, *(x[2:] for x in args), 3)
    rows = tokens.unflatten(0, (N_BLOCKS, BATCH))[:, 2:]
    torch.testing.assert_close(half.unflatten(0, (N_BLOCKS, 2)), rows, rtol=0, atol=1e-6)
    assert not torch.allclose(first_tokens(predictor, *args, 4), tokens)
    moved = first_tokens(predictor, *args[:4], batch.sample_ids + 1, 3)
    assert not torch.allclose(moved, tokens)
    assert torch.equal(moved[:, :N_CONTEXT], tokens[:, :N_CONTEXT])


def test_tied_noise_trains_the_context_projection_but_not_its_bias():
    config = tiny_config("njepa", noise={"space": "encoder_tied"})
    predictor, batch = build_predictor(config, "predictor", noisy=True), make_batch(config)
    tokens = first_tokens(
        predictor, context(), batch.context_idx, batch.target_idx, batch.sigma,
        batch.sample_ids, 0,
    )  # fmt: skip
    tokens[:, N_CONTEXT:].square().sum().backward()
    assert predictor.predictor_embed.weight.grad.abs().max() > 1
    assert predictor.predictor_embed.bias.grad.abs().max() < 1e-4


@pytest.mark.parametrize("level_map", ["per_block", "per_token"])
def test_level_embedding(level_map: str):
    noise = {"level_embedding": "add", "map": level_map}
    config, without = tiny_config("njepa", noise=noise), tiny_config("njepa", noise={**noise, "level_embedding": "none"})  # noqa: E501  # fmt: skip
    predictor, queries = noisy_tokens(config)
    plain, plain_queries = noisy_tokens(without)
    assert torch.equal(queries, plain_queries)  # zero-initialised
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, predictor.get_parameter(name)), name
    torch.nn.init.normal_(predictor.level_embed.weight, generator=torch.Generator().manual_seed(1))
    batch = make_batch(config)
    tokens = first_tokens(
        predictor, context(), batch.context_idx, batch.target_idx, batch.sigma,
        batch.sample_ids, 3,
    )  # fmt: skip
    moved = tokens[:, N_CONTEXT:].unflatten(0, (N_BLOCKS, BATCH)).transpose(0, 1)
    term = sincos(batch.sigma.log() / 4, 24) @ predictor.level_embed.weight.T
    term = term.unsqueeze(2) if level_map == "per_block" else term
    torch.testing.assert_close(moved - queries, term.expand_as(moved), rtol=1e-4, atol=1e-5)


def test_position_table_is_not_written_to():
    config = tiny_config("njepa", noise={"space": "encoder_tied", "level_embedding": "add"})
    predictor, batch = build_predictor(config, "predictor", noisy=True), make_batch(config)
    before = predictor.predictor_pos_embed.clone()
    predictor(context(), batch.context_idx, batch.target_idx, batch.sigma, batch.sample_ids, 0)
    assert torch.equal(predictor.predictor_pos_embed, before)
    assert not predictor.predictor_pos_embed.requires_grad


def test_initial_weights():
    config = tiny_config(model={"predictor": {"width": 128, "depth": 1, "heads": 2}})
    predictor = build_predictor(config, "predictor", noisy=False)
    assert 0.015 < predictor.mask_token.std() < 0.025
    assert abs(predictor.predictor_proj.weight.std().item() - 0.02) < 0.001
    assert torch.count_nonzero(predictor.predictor_embed.bias) == 0
    other = build_predictor(config, "noise_predictor", noisy=False)
    assert not torch.equal(other.mask_token, predictor.mask_token)


def test_heads_default_to_the_encoders():
    config = tiny_config(model={"heads": 4, "predictor": {"width": 24, "depth": 1}})
    predictor = build_predictor(config, "predictor", noisy=False)
    assert predictor.predictor_blocks[0].attn.num_heads == 4
    bad = tiny_config(model={"heads": 4, "predictor": {"width": 28, "depth": 1, "heads": 3}})
    with pytest.raises(ConfigError, match=r"model.predictor.width=28.*heads=3"):
        build_predictor(bad, "predictor", noisy=False)


def test_sigma_where_it_cannot_act():
    config = tiny_config("njepa")
    batch = make_batch(config)
    clean = build_predictor(config, "predictor", noisy=False)
    with pytest.raises(ValueError, match="built with noise"):
        clean(context(), batch.context_idx, batch.target_idx, batch.sigma, batch.sample_ids)
    noisy = build_predictor(config, "predictor", noisy=True)
    with pytest.raises(ValueError, match="sample_ids=None"):
        noisy(context(), batch.context_idx, batch.target_idx, batch.sigma)
