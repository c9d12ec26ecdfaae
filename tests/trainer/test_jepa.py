"""The composition: which modules exist, whose weights they start from, what comes out."""

from __future__ import annotations

import pytest
import torch
from tiny import N_BLOCKS, N_TARGETS, make_batch, tiny_config

from njepa.config import Config
from njepa.models.jepa import Jepa, JepaOutput, build_jepa

VARIANTS = {
    "ijepa": tiny_config("ijepa"),
    "cjepa": tiny_config("cjepa"),
    "njepa": tiny_config("njepa"),
    "ncjepa": tiny_config("ncjepa"),
    "shared": tiny_config("ncjepa", noise={"predictors": 1, "level_embedding": "add"}),
    "tied": tiny_config("njepa", noise={"space": "encoder_tied", "map": "all"}),
    "off": tiny_config("njepa", noise={"weight": 0.0, "predictors": 1}),
}


def run(config: Config, jepa: Jepa | None = None) -> JepaOutput:
    batch = make_batch(config)
    jepa = build_jepa(config) if jepa is None else jepa
    return jepa(batch.images, batch.context_idx, batch.target_idx, batch.sigma, batch.sample_ids, 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_encoder_and_first_predictor_start_alike_in_every_variant(name: str):
    plain, other = build_jepa(VARIANTS["ijepa"]), build_jepa(VARIANTS[name])
    for module in ("encoder", "predictor"):
        theirs = other.get_submodule(module).state_dict()
        for key, value in plain.get_submodule(module).state_dict().items():
            assert torch.equal(value, theirs[key]), key


def test_second_predictor_has_weights_of_its_own():
    jepa = build_jepa(VARIANTS["njepa"])
    assert not torch.equal(jepa.predictor.mask_token, jepa.noise_predictor.mask_token)


@pytest.mark.parametrize(
    ("name", "second", "projector"),
    [
        ("ijepa", False, False), ("cjepa", False, True), ("njepa", True, False),
        ("ncjepa", True, True), ("shared", False, True), ("off", False, False),
    ],
)  # fmt: skip
def test_only_what_is_needed_is_built(name: str, second: bool, projector: bool):
    jepa = build_jepa(VARIANTS[name])
    assert (jepa.noise_predictor is not None) == second
    assert (jepa.projector is not None) == projector


def test_outputs():
    one = N_BLOCKS * 4
    output = run(VARIANTS["ijepa"])
    assert output.clean.shape == (one, N_TARGETS, 32)
    assert output.context.shape == (4, 10, 32)
    assert output.noised is None
    assert output.noised_idx is None
    output = run(VARIANTS["njepa"])
    assert output.clean.shape == output.noised.shape == (one, N_TARGETS, 32)
    output = run(VARIANTS["shared"])
    assert output.clean is None
    assert output.noised.shape == (one, N_TARGETS, 32)
    output = run(VARIANTS["tied"])
    assert output.noised.shape == (4 * one, N_TARGETS, 32)
    assert output.noised_idx.shape == (4, 4 * N_BLOCKS, N_TARGETS)


def test_clean_branch_is_that_of_ijepa():
    assert torch.equal(run(VARIANTS["njepa"]).clean, run(VARIANTS["ijepa"]).clean)


def test_map_all_is_level_major():
    """Rows of level k are what one level for all blocks gives, with the noise of blocks k*M + m."""
    config = tiny_config("njepa", noise={"map": "all", "predictors": 1})
    jepa, batch = build_jepa(config), make_batch(config)
    everything = run(config, jepa).noised.unflatten(0, (4, N_BLOCKS * 4))
    z = jepa.encoder(batch.images, batch.context_idx)
    zero = torch.zeros(4, N_BLOCKS)
    for k in range(4):
        padded = batch.target_idx.repeat(1, k + 1, 1)
        sigma = torch.cat([zero] * k + [batch.sigma[:, k * N_BLOCKS : (k + 1) * N_BLOCKS]], dim=1)
        alone = jepa.predictor(z, batch.context_idx, padded, sigma, batch.sample_ids, 0)
        torch.testing.assert_close(everything[k], alone[-N_BLOCKS * 4 :], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(everything[0], everything[3])


def test_sigma_must_fit_the_model():
    batch = make_batch(VARIANTS["njepa"])
    args = (batch.images, batch.context_idx, batch.target_idx)
    with pytest.raises(ValueError, match="sigma=None and noise"):
        build_jepa(VARIANTS["njepa"])(*args)
    with pytest.raises(ValueError, match="and no noise"):
        build_jepa(VARIANTS["ijepa"])(*args, batch.sigma, batch.sample_ids)
