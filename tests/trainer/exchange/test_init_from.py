"""``model.init_from``: what a run starts from, in every method and at other image sizes."""

import pytest
import torch
from torch.nn import functional as F

from njepa.config import ConfigError
from njepa.exchange.initial import read_initial_weights
from njepa.exchange.positions import resize_positions
from njepa.models.jepa import build_jepa
from njepa.models.positions import position_table
from njepa.training.ema import make_target
from tests.support.weight_sources import config_of, network, noise_images, published, write_run

METHODS = ["ijepa", "cjepa", "njepa", "ncjepa"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Run folders by method."""
    found = {}
    for method in METHODS:
        config = config_of(method)
        found[method] = (tmp_path_factory.mktemp("runs") / method, *network(config))
        write_run(found[method][0], config, *found[method][1:])
    return found


def started(method, source, **sections):
    """(network, target, what was read) of a new run."""
    model = {"init_from": str(source), **sections.pop("model", {})}
    config = config_of(method, model=model, **sections)
    initial = read_initial_weights(config)
    jepa = build_jepa(config)
    target = make_target(jepa.encoder)
    initial.load_into(jepa, target)
    return jepa, target, initial


def equal(module, other, skip=()):
    state = other.state_dict()
    for name, tensor in module.state_dict().items():
        if name not in skip:
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("origin", METHODS)
def test_any_method_goes_on_from_any(sources, method, origin):
    folder, jepa, target = sources[origin]
    new, new_target, _ = started(method, folder)
    equal(new.encoder, jepa.encoder)
    equal(new_target, target)
    equal(new.predictor, jepa.predictor, skip=["noise_mask_token"])
    noised = jepa.noise_predictor or jepa.predictor
    own = getattr(noised, "noise_mask_token", None)
    token = noised.mask_token if own is None else own
    if new.noise_predictor is not None:
        equal(new.noise_predictor, noised, skip=["mask_token", "noise_mask_token"])
        assert torch.equal(new.noise_predictor.mask_token, token)
    if new.predictor.noise_mask_token is not None:
        assert torch.equal(new.predictor.noise_mask_token, token)


def test_a_shared_mask_token_is_the_clean_one(sources):
    folder, jepa, _ = sources["njepa"]
    new, _, _ = started("njepa", folder, noise={"mask_token": "shared"})
    assert new.noise_predictor.mask_token is new.predictor.mask_token
    assert torch.equal(new.predictor.mask_token, jepa.predictor.mask_token)


@pytest.mark.parametrize("which", ["target", "context"])
def test_both_from_one(sources, which):
    folder, jepa, target = sources["ijepa"]
    new, new_target, initial = started("ijepa", folder, model={"init_which": which})
    origin = target if which == "target" else jepa.encoder
    equal(new.encoder, origin)
    equal(new_target, origin)
    assert f"context encoder from {which}, target from {which}, predictor" in initial.told


def test_without_its_predictor(sources):
    folder, jepa, _ = sources["ijepa"]
    other = {"init_predictor": False, "predictor": {"width": 16, "depth": 1, "heads": 1}}
    new, _, initial = started("ijepa", folder, model=other)
    equal(new.encoder, jepa.encoder)
    equal(new.predictor, build_jepa(config_of(model=other)).predictor)
    assert initial.told.endswith("no predictor")


def test_official_file_with_another_image_size(tmp_path):
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    model = {"width": None, "depth": None, "heads": None, "patch_size": 16}
    model["predictor"] = {"width": 24, "depth": 2, "heads": 3}
    config = config_of(data=imagenet | {"image_size": 64}, model=model)
    jepa, target = network(config)
    file = tmp_path / "IN1K-vit.t.16-300e.pth.tar"
    torch.save(published(jepa, target), file)
    new, new_target, initial = started(
        "cjepa", file, data=imagenet | {"image_size": 96}, model=model
    )
    equal(new.encoder, jepa.encoder, skip=["pos_embed"])
    equal(new.predictor, jepa.predictor, skip=["predictor_pos_embed"])
    assert "positions of 64 px resized to 96 px" in initial.told
    for table, width in (
        (new.encoder.pos_embed, 192), (new_target.pos_embed, 192),
        (new.predictor.predictor_pos_embed, 24),
    ):  # fmt: skip
        at = (torch.arange(6.0, dtype=torch.float64) + 0.5) * 4 / 6 - 0.5
        column = at.repeat(6)[:, None] * 10000.0 ** -(torch.arange(width // 4) / (width / 4))
        expected = torch.cat((column.sin(), column.cos()), 1).float()
        torch.testing.assert_close(table[0, :, : width // 2], expected, rtol=0, atol=1e-6)
    assert torch.isfinite(new.encoder(noise_images(96))).all()


@pytest.mark.parametrize("side", [3, 8, 12])
def test_sincos_tables_are_exact_where_interpolation_is_near(side):
    table = position_table(32, (6, 6), 0.5).unsqueeze(0)
    exact = resize_positions(table, side)[0]
    image = table.reshape(1, 6, 6, 32).permute(0, 3, 1, 2)
    near = F.interpolate(image, size=(side, side), mode="bicubic").flatten(2)[0].T
    inner = (torch.arange(side) > 1) & (torch.arange(side) < side - 2)
    if side > 6:  # away from the border, which interpolation repeats
        both = (inner[:, None] & inner[None]).flatten()
        assert (exact - near)[both].abs().max() < 0.08
        assert (exact - near)[both].square().mean().sqrt() < 0.01
    if side == 3:  # a place between four patches
        row = 0.5 * torch.sin(torch.tensor(0.5))
        torch.testing.assert_close(exact[0, [0, 16]], torch.stack((row, row)))
    same = resize_positions(table, 6)
    assert same is table


def test_learnt_tables_are_interpolated_over_all_positions():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, 16, 8, generator=generator)
    table = table + torch.arange(16.0).reshape(1, 16, 1)
    grown = resize_positions(table, 8)
    assert grown.shape == (1, 64, 8)
    torch.testing.assert_close(grown.mean(), table.mean(), rtol=0.05, atol=0)
    constant = resize_positions(torch.full((1, 16, 8), 3.0), 2)
    torch.testing.assert_close(constant, torch.full((1, 4, 8), 3.0))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"patch_size": 4}},
            r"got model.patch_size=8, expected model.patch_size=4; set model.patch_size=8$",
        ),
        (
            {"model": {"width": 64, "depth": 3}},
            r"got model.width=32 model.depth=2, expected model.width=64 model.depth=3; set",
        ),
        ({"model": {"heads": 4}}, r"; set model.heads=2$"),
        ({"data": {"mean": [0.5, 0.5, 0.5]}}, r"; set data.mean=\[0.5,0.25,0.4\]"),
        (
            {"model": {"predictor": {"width": 24, "depth": 4, "heads": 3}}},
            r"; set model.predictor.depth=2, or model.init_predictor=false",
        ),
        ({"model": {"predictor": {"width": 24, "depth": 2, "heads": 2}}}, r"predictor.heads=3"),
        ({"model": {"init_from": "???"}}, "model.init_from is not set"),
        ({"model": {"init_from": "nowhere/at/all"}}, "does not exist"),
    ],
)
def test_what_does_not_fit(sources, sections, message):
    with pytest.raises(ConfigError, match=message):
        started("ijepa", sources["ijepa"][0], **sections)


def test_the_published_size_is_named(tmp_path):
    config = config_of(model={"width": None, "depth": None, "heads": None})
    write_run(tmp_path, config, *network(config))
    with pytest.raises(
        ConfigError, match=r"set model.width=192 model.depth=12 model.heads=3 \(vit_tiny has"
    ):
        started("ijepa", tmp_path)


def test_nothing_asked_for():
    assert read_initial_weights(config_of()) is None
