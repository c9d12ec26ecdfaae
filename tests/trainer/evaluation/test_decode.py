"""Predictions as pixels: the decoder, its numbers and its picture."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from njepa import cli
from njepa.config import ConfigError
from njepa.data.batch import Masks
from njepa.evaluation import decode
from njepa.evaluation.decode_probe import CELL, FOOT, FRAME, GAP, HEAD, decode_probe, sheet
from njepa.evaluation.predicting import open_predicting
from njepa.evaluation.task import open_task
from njepa.exchange.export import export
from tests.support.subjects import make_run, make_stripes, probe_arguments, refusal
from tests.support.weight_sources import config_of, network, write_run


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(decode, "STEPS", 60)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs of three methods, and images in one folder: nobody needs labels here."""
    root = tmp_path_factory.mktemp("decode")
    for name, sections in {
        "ijepa": {},
        "njepa": {"noise": {"predictors": "shared", "mask_token": "shared", "sigma": 0.3}},
        "single": {"noise": {"weight": 1.0, "predictors": "single"}},
    }.items():
        config = config_of("njepa" if name == "njepa" else "ijepa", **sections)
        write_run(root / name, config, *network(config))
    for side, n in (("train", 70), ("test", 24)):
        made = make_stripes(root / f"{side}-classes", n, seed=n)
        (root / side).mkdir()
        for i, file in enumerate(sorted(made.rglob("*.jpg"))):
            shutil.copy(file, root / side / f"{i}.jpg")
    return root


def arguments(root, run="ijepa", *more):
    return probe_arguments(root, run, "--kind", "decode", *more)


def a_batch(config, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 48, 48, 3), generator=generator, dtype=torch.uint8)
    places = torch.rand(n, 36, generator=generator).argsort(1)
    targets = places[:, 10:26].unflatten(1, (4, 4)).sort(-1).values
    return images, Masks(places[:, :10].sort(1).values, targets), np.arange(n) + 3


def test_a_decoder_learns_what_its_tokens_hold():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4000, 12), generator=generator, dtype=torch.uint8)
    base, truth = pixels.float().mean(0) / 255, pixels[3000:].float() / 255
    told = pixels.float() @ torch.randn(12, 16, generator=generator) + 7
    silent = torch.randn(4000, 16, generator=generator)
    constant = (base - truth).square().mean()
    found = [
        (decode.fit(tokens[:3000], pixels[:3000], base, 0)(tokens[3000:]) - truth).square().mean()
        for tokens in (told, silent)
    ]
    assert found[0] < 0.2 * constant
    assert 0.95 * constant < found[1] < 1.5 * constant
    with pytest.raises(ConfigError, match="tokens that are not finite"):
        decode.fit(told / 0, pixels, base, 0)


def test_patches_are_cut_and_pasted_where_they_belong():
    images, masks, _ = a_batch(None)
    patches = decode.cut(images, 8)
    assert torch.equal(patches[2, 9], images[2, 8:16, 24:32].flatten())  # row 1, column 3 of 6
    assert torch.equal(decode.join(patches, 8), images)
    wanted = decode.at_targets(patches, masks)
    assert torch.equal(wanted[1, 2, 3], patches[1, masks.target_idx[1, 2, 3]])
    assert torch.equal(decode.pasted(images, masks, wanted / 255, 8), images)
    dark = decode.cut(decode.pasted(images, masks, 0.0 * wanted, 8), 8)
    context = decode.cut(decode.context_only(images, masks, 8), 8)
    for b in range(len(images)):
        for n in range(36):
            hidden, kept = n in masks.target_idx[b], n in masks.context_idx[b]
            assert torch.equal(dark[b, n], 0 * dark[b, n] if hidden else patches[b, n])
            assert torch.equal(context[b, n], patches[b, n] if kept else 0 * dark[b, n] + 128)


def test_predictions_are_those_of_each_block_alone(world):
    net = open_predicting(str(world / "njepa"))
    images, masks, ids = a_batch(net.config)
    (clean,) = decode.predictions(net, "clean", 0)(images, masks, ids)
    z = net.jepa.encoder(images, masks.context_idx)
    for m in range(4):
        alone = net.jepa.predictor(z, Masks(masks.context_idx, masks.target_idx[:, m : m + 1]))
        torch.testing.assert_close(clean[:, m], alone, rtol=1e-4, atol=1e-5)
    # Without noise both queries are the same; with it, draws differ and a seed repeats them.
    (still,) = decode.predictions(net, "noised", 0, factor=0.0)(images, masks, ids)
    torch.testing.assert_close(still, clean, rtol=1e-4, atol=1e-5)
    first, second = decode.predictions(net, "noised", 0, draws=2)(images, masks, ids)
    assert not torch.allclose(first, second, atol=1e-3)
    again, _ = decode.predictions(net, "noised", 0, draws=2)(images, masks, ids)
    assert torch.equal(first, again)
    stronger = decode.predictions(net, "noised", 0, factor=3.0)(images, masks, ids)[0]
    assert (stronger - clean).norm() > (first - clean).norm()
    (h,) = decode.target_tokens(net)(images, masks, ids)
    features = net.target(images)[1, masks.target_idx[1, 2]]
    torch.testing.assert_close(h[1, 2], F.layer_norm(features, (32,)))


def test_numbers_are_those_of_the_errors():
    rng = np.random.default_rng(0)
    reference = rng.uniform(0.02, 0.06, 50)
    errors = 0.5 * reference + 0.001 * rng.normal(size=50)
    found = decode.Measured(torch.tensor(errors), 0.0, []).entry(torch.tensor(reference))
    mse = errors.mean()
    half = 1.959964 * errors.std(ddof=1) / math.sqrt(50)
    assert found["mse"] == pytest.approx(mse, rel=1e-3)
    assert found["ci95"] == pytest.approx([mse - half, mse + half], rel=1e-3)
    assert found["psnr"] == pytest.approx(-10 * math.log10(mse), abs=0.01)
    assert found["explained"] == pytest.approx(100 * (1 - mse / reference.mean()), abs=0.01)
    # By the bootstrap over images; hard images are hard for both, so this is the narrow one.
    rows = rng.integers(0, 50, (4000, 50))
    shares = 100 * (1 - errors[rows].mean(1) / reference[rows].mean(1))
    expected = np.quantile(shares, [0.025, 0.975])
    assert found["explained_ci95"] == pytest.approx(expected, abs=0.15)


def test_the_command_on_images_without_labels(world, capsys):
    out, picture = world / "out.json", world / "ijepa" / "decode.png"
    assert cli.main(arguments(world, "ijepa", "--json", str(out))) == 0
    table, result = capsys.readouterr().out, json.loads(out.read_text())["decode"]
    # The random target encoder keeps its pixels; a predictor that nobody trained knows none.
    assert result["target"]["explained"] > 50
    assert result["target"]["explained"] > result["prediction"]["explained_ci95"][1] + 20
    assert set(result["floors"]) == {"untrained", "place", "mean"}
    assert result["floors"]["mean"]["explained"] == 0
    assert result["images"] == {"train": 70, "test": 24}
    assert "noised" not in result
    assert "no noised predictions: the run has no noise" in table
    assert f"{result['target']['explained']:.2f} [" in table
    assert result["picture"] == str(picture)
    with Image.open(picture) as image:
        columns = 5  # image, context, average image, prediction, target features
        assert image.size == ((CELL + GAP) * columns + GAP, HEAD + (CELL + GAP) * 8 + FOOT)
        drawn = np.asarray(image)
    left = [GAP + x * (CELL + GAP) for x in range(columns)]
    framed = [(drawn[HEAD:-FOOT, x : x + CELL] == FRAME).all(-1).any() for x in left]
    assert framed == [True, False, True, True, True]
    assert cli.main(arguments(world, "ijepa", "--json", str(out))) == 0
    assert json.loads(out.read_text())["decode"] == result  # and the picture, bit for bit
    with Image.open(picture) as image:
        assert np.array_equal(np.asarray(image), drawn)


def sides(world):
    return open_task(
        world / "train", world / "test", world / "cache", (None, None), 0, labelled=False
    )


@pytest.mark.parametrize(("run", "clean"), [("njepa", True), ("single", False)])
def test_noise(world, run, clean):
    net = open_predicting(str(world / run))
    result, columns = decode_probe(net, sides(world), 0, "cpu", floors=False)
    assert ("prediction" in result) == clean
    assert "floors" not in result
    assert result["noise"]["draws"] == 3
    assert 0 < result["noised"]["spread"] < result["noised_more"]["spread"]
    titles = ["noise, draw 1", "noise, draw 2", "noise, draw 3", "noise x 2", "target features"]
    assert [c.title for c in columns][3:] == ["prediction"] * clean + titles
    assert not torch.equal(columns[-5].cells, columns[-4].cells)
    assert sheet(columns).width == (CELL + GAP) * len(columns) + GAP


def test_an_official_file_is_read_with_its_predictor(world, tmp_path):
    export(str(world / "njepa"), tmp_path / "official", "ijepa")
    file = tmp_path / "official" / "ijepa.pth.tar"
    net, run = open_predicting(str(file)), open_predicting(str(world / "njepa"))
    images, masks, ids = a_batch(run.config)
    expected = decode.predictions(run, "clean", 0)(images, masks, ids)[0]
    torch.testing.assert_close(decode.predictions(net, "clean", 0)(images, masks, ids)[0], expected)
    torch.testing.assert_close(net.target(images), run.target(images))
    result, _ = decode_probe(net, sides(world), 0, "cpu", floors=False)
    assert "noised" not in result
    assert "published masks" in result["assumed"]


def test_what_is_refused(world, tmp_path, capsys):
    export(str(world / "ijepa"), tmp_path / "timm", "timm")
    err = refusal(capsys, arguments(world, str(tmp_path / "timm")))
    assert "needs a predictor with its context and target encoders, got" in err
    make_run(tmp_path / "half")  # a checkpoint with a target encoder alone
    err = refusal(capsys, arguments(world, str(tmp_path / "half")))
    assert "with no predictor; give a run folder, a checkpoint" in err
    for more, message in (
        (("--picture", str(world / "x.jpg")), "--picture must be a .png file, got"),
        (("--picture", str(world / "no" / "x.png")), "cannot be written in"),
        (("--kind", "knn", "--picture", "x.png"), "needs --kind decode, got --kind knn"),
    ):
        assert message in refusal(capsys, arguments(world, "ijepa", *more))
    assert cli.main(arguments(world, "ijepa", "--max-test", "1")) == 2
    assert "needs two test images or more for its intervals, got 1" in capsys.readouterr().err
