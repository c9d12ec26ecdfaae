"""The composition: which modules exist, whose weights they start from, what comes out."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from njepa.config import Config
from njepa.models.jepa import Jepa, JepaOutput, build_jepa
from njepa.models.predictor import build_predictor
from tests.support.tiny import N_BLOCKS, N_TARGETS, make_batch, tiny_config

PREDICTORS, TOKENS = ("unshared", "shared", "single"), ("unshared", "shared")
NOISED = {
    f"{predictors}-{token}": tiny_config(
        "njepa", noise={"predictors": predictors, "mask_token": token}
    )
    for predictors, token in product(PREDICTORS, TOKENS)
}
OFF = {"weight": 0.0, "consistency": 0.0}
VARIANTS = {
    "ijepa": tiny_config("ijepa"),
    "cjepa": tiny_config("cjepa"),
    "ncjepa": tiny_config("ncjepa"),
    **NOISED,
    "tied": tiny_config("njepa", noise={"space": "encoder_tied"}),
    "tied-shared": tiny_config("njepa", noise={"space": "encoder_tied", "predictors": "shared"}),
    "consistency-alone": tiny_config("njepa", noise={"weight": 0.0}),
    "noised-alone": tiny_config("njepa", noise={"consistency": 0.0}),
    **{f"off-{p}": tiny_config("njepa", noise={**OFF, "predictors": p}) for p in PREDICTORS},
}


def run(config: Config, jepa: Jepa | None = None, sigmas: tuple[float, ...] = (0.5,)) -> JepaOutput:
    batch = make_batch(config, sigmas=sigmas)
    jepa = build_jepa(config) if jepa is None else jepa
    return jepa(batch.images, batch.masks, batch.noise)


# What is built


def trained(config: Config) -> set[str]:
    return {name for name, p in build_jepa(config).named_parameters() if p.requires_grad}


PLAIN = trained(VARIANTS["ijepa"])
OF_PREDICTOR = {name for name in PLAIN if name.startswith("predictor.")}
SECOND = {f"noise_{name}" for name in OF_PREDICTOR}
MORE = {
    "ijepa": set(),
    "unshared-unshared": SECOND,
    "unshared-shared": SECOND - {"noise_predictor.mask_token"},
    "shared-unshared": {"predictor.noise_mask_token"},
    "shared-shared": set(),
    "single-unshared": set(),
    "single-shared": set(),
    "tied": SECOND,
    "tied-shared": {"predictor.noise_mask_token"},
    "consistency-alone": SECOND,
    "noised-alone": SECOND,
    **{f"off-{p}": set() for p in PREDICTORS},
}


@pytest.mark.parametrize("name", MORE)
def test_only_what_is_needed_is_built(name: str):
    """Each parameter once, under its own name; that of two modules under the clean one's."""
    assert trained(VARIANTS[name]) == PLAIN | MORE[name]


@pytest.mark.parametrize(
    ("name", "projector"),
    [("ijepa", False), ("cjepa", True), ("unshared-unshared", False), ("ncjepa", True)],
)
def test_the_projector_belongs_to_vicreg(name: str, projector: bool):
    assert (build_jepa(VARIANTS[name]).projector is not None) == projector


# Weights at the start


@pytest.mark.parametrize("name", VARIANTS)
def test_encoder_and_first_predictor_start_alike_in_every_variant(name: str):
    plain, other = build_jepa(VARIANTS["ijepa"]), build_jepa(VARIANTS[name])
    for module in ("encoder", "predictor"):
        theirs = other.get_submodule(module).state_dict()
        for key, value in plain.get_submodule(module).state_dict().items():
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("token", TOKENS)
def test_the_second_predictor_starts_from_its_own_stream(token: str):
    config = NOISED[f"unshared-{token}"]
    jepa, expected = build_jepa(config), build_predictor(config, "noise_predictor").state_dict()
    for name, value in jepa.noise_predictor.state_dict().items():
        if name == "mask_token" and token == "shared":
            assert jepa.noise_predictor.mask_token is jepa.predictor.mask_token
            assert not torch.equal(value, expected[name])
        else:
            assert torch.equal(value, expected[name]), name


def test_both_ways_to_two_mask_tokens_start_from_the_same_two():
    two, one = (build_jepa(NOISED[f"{p}-unshared"]) for p in ("unshared", "shared"))
    assert torch.equal(two.noise_predictor.mask_token, one.predictor.noise_mask_token)
    assert torch.equal(two.predictor.mask_token, one.predictor.mask_token)


# What comes out


def test_without_noise():
    output = run(VARIANTS["ijepa"])
    assert output.clean.shape == (N_BLOCKS * 4, N_TARGETS, 32)
    assert output.context.shape == (4, 10, 32)
    assert output.noised is None


@pytest.mark.parametrize("name", NOISED)
def test_clean_predictions_are_those_of_ijepa(name: str):
    output, plain = run(NOISED[name]), run(VARIANTS["ijepa"])
    assert torch.equal(output.context, plain.context)
    assert output.noised.shape == plain.clean.shape
    if name.startswith("single"):
        assert output.clean is None
        assert (output.noised - plain.clean).abs().max() > 1e-3
        return
    if name.startswith("unshared"):
        assert torch.equal(output.clean, plain.clean)
    else:  # products of twice the rows may round differently
        torch.testing.assert_close(output.clean, plain.clean, rtol=1e-5, atol=1e-6)
    assert (output.noised - output.clean).abs().max() > 1e-3


@pytest.mark.parametrize("name", NOISED)
def test_noised_predictions_at_sigma_zero(name: str):
    """Those of the clean predictor where nothing else differs; else of its own weights."""
    config = NOISED[name]
    jepa, predictors = build_jepa(config), name.split("-")[0]
    output, plain = run(config, jepa, sigmas=(0.0,)), run(VARIANTS["ijepa"])
    if predictors == "single":
        assert torch.equal(output.noised, plain.clean)
    elif name == "shared-shared":
        assert torch.equal(output.noised, output.clean)
    else:
        twin = build_jepa(VARIANTS["ijepa"])
        if predictors == "unshared":
            twin.predictor.load_state_dict(jepa.noise_predictor.state_dict())
        else:
            with torch.no_grad():
                twin.predictor.mask_token.copy_(jepa.predictor.noise_mask_token)
        expected = run(VARIANTS["ijepa"], twin).clean
        torch.testing.assert_close(output.noised, expected, rtol=1e-5, atol=1e-6)
        assert (expected - plain.clean).abs().max() > 1e-4


def test_predictors_have_each_their_gradient():
    jepa = build_jepa(NOISED["unshared-unshared"])
    for part, others in (("clean", "noise_predictor"), ("noised", "predictor")):
        jepa.zero_grad()
        getattr(run(NOISED["unshared-unshared"], jepa), part).square().sum().backward()
        assert all(p.grad is None for p in jepa.get_submodule(others).parameters())
        assert jepa.encoder.blocks[0].attn.qkv.weight.grad.norm() > 0


def test_a_mask_token_of_two_predictors_gets_the_sum_of_their_gradients():
    grads = {}
    for token in TOKENS:
        config = NOISED[f"unshared-{token}"]
        jepa = build_jepa(config)
        with torch.no_grad():
            jepa.noise_predictor.mask_token.copy_(jepa.predictor.mask_token)
        output = run(config, jepa)
        (output.clean.square().sum() + 3 * output.noised.square().sum()).backward()
        grads[token] = {n: p.grad for n, p in jepa.named_parameters() if p.requires_grad}
    name = "predictor.mask_token"
    expected = grads["unshared"][name] + grads["unshared"].pop(f"noise_{name}")
    torch.testing.assert_close(grads["shared"][name], expected, rtol=1e-5, atol=1e-7)
    assert grads["shared"].keys() == grads["unshared"].keys()
    for key, grad in grads["unshared"].items():
        assert key == name or torch.equal(grads["shared"][key], grad), key


def test_noise_must_fit_the_model():
    config = NOISED["unshared-unshared"]
    batch = make_batch(config)
    for name in ("unshared-unshared", "shared-shared", "single-shared"):
        with pytest.raises(ValueError, match="got none and a model with"):
            build_jepa(NOISED[name])(batch.images, batch.masks)
    with pytest.raises(ValueError, match="got some and a model without"):
        build_jepa(VARIANTS["ijepa"])(batch.images, batch.masks, batch.noise)
