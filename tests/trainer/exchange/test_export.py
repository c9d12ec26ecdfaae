"""Exports are loaded by the real libraries, and their features are the network's own."""

import json

import pytest
import torch
import yaml

from njepa.cli import main
from njepa.config import ConfigError
from njepa.evaluation.predicting import open_predicting
from njepa.exchange.initial import read_initial_weights
from njepa.exchange.reading import open_weights, read_encoder
from tests.support.weight_sources import (
    MEAN,
    STD,
    config_of,
    network,
    noise_images,
    normalised,
    write_run,
)

SHARED = {"width": 24, "depth": 2, "heads": 3, "context": "shared"}
WITHIN = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, context encoder, target encoder) of a run with two predictors."""
    config = config_of("njepa")
    jepa, target = network(config)
    folder = tmp_path_factory.mktemp("runs") / "one"
    write_run(folder, config, jepa, target)
    return folder, jepa, target


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Export once each; returns a function (format, which) -> folder."""
    root, done = tmp_path_factory.mktemp("exports"), {}

    def of(form, which=None):
        if (form, which) not in done:
            out = root / f"{form}-{which}"
            option = [] if which is None else ["--which", which]
            assert main(["export", str(run[0]), str(out), "--format", form, *option]) == 0
            done[form, which] = out
        return done[form, which]

    return of


def own_features(run, which):
    _, jepa, target = run
    with torch.no_grad():
        return (target if which == "target" else jepa.encoder)(noise_images())


@pytest.mark.parametrize("which", ["target", "context"])
def test_timm(run, exported, which):
    timm = pytest.importorskip("timm")
    model = timm.create_model(f"local-dir:{exported('timm', which)}", pretrained=True).eval()
    with torch.no_grad():
        tokens = model.forward_features(normalised(noise_images()))
        pooled = model(normalised(noise_images()))
    torch.testing.assert_close(tokens, own_features(run, which), **WITHIN)
    torch.testing.assert_close(pooled, own_features(run, which).mean(1), **WITHIN)
    config = timm.data.resolve_model_data_config(model)
    assert [*config["mean"], *config["std"]] == [*MEAN, *STD]
    assert (config["input_size"], config["crop_pct"]) == ((3, 48, 48), 0.875)


@pytest.mark.parametrize("which", ["target", "context"])
def test_transformers(run, exported, which):
    transformers = pytest.importorskip("transformers", reason="needs the extra [export]")
    folder = exported("transformers", which)
    model, info = transformers.IJepaModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.layer_norm_eps == 1e-6
    with torch.no_grad():
        tokens = model.eval()(normalised(noise_images())).last_hidden_state
    torch.testing.assert_close(tokens, own_features(run, which), **WITHIN)
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    given = processor(list(noise_images().permute(0, 3, 1, 2)), return_tensors="pt")
    torch.testing.assert_close(given.pixel_values, normalised(noise_images()), **WITHIN)


@pytest.mark.parametrize(
    ("which", "under_encoder", "beside"),
    [
        (None, "context", "target_encoder"),
        ("context", "context", "target_encoder"),
        ("target", "target", "context_encoder"),
    ],
)
def test_published_layout(run, exported, which, under_encoder, beside):
    timm = pytest.importorskip("timm")
    folder = exported("ijepa", which)
    file = folder / "ijepa.pth.tar"
    content = torch.load(file, weights_only=True)
    assert {"encoder", "target_encoder", "predictor", "noise_predictor", beside} <= set(content)
    _, jepa, target = run
    for key, module in (("predictor", jepa.predictor), ("noise_predictor", jepa.noise_predictor)):
        for name, tensor in module.state_dict().items():
            assert torch.equal(content[key][f"module.{name}"], tensor), name
    model = timm.create_model(
        "vit_huge_patch14_gap_224", pretrained=True, pretrained_cfg_overlay={"file": str(file)},
        num_classes=0, img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2,
        mlp_ratio=4, class_token=False, global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip
    with torch.no_grad():
        tokens = model.forward_features(normalised(noise_images()))
    torch.testing.assert_close(tokens, own_features(run, under_encoder), **WITHIN)
    assert f"holds the {under_encoder} encoder" in (folder / "README.md").read_text()
    weights = open_weights(file)  # and back: which is which is not lost
    for name, own in (("target", target), ("context", jepa.encoder)):
        read = weights.encoder(name)
        assert torch.equal(read.state["norm.weight"], own.norm.weight)
        assert (list(read.mean), read.heads) == (MEAN, 2)
    assert weights.predictor_heads == 3


def test_a_predictor_with_a_shared_context_says_so(run, tmp_path, capsys, caplog):
    """Same tensors, another model: whoever reads them is told, and read back it is what it was."""
    config = config_of(model={"predictor": SHARED})
    folder, out = tmp_path / "run", tmp_path / "out"
    jepa, target = network(config)
    write_run(folder, config, jepa, target)
    assert main(["export", str(folder), str(out), "--format", "ijepa"]) == 0
    told = "trained with `model.predictor.context=shared`"
    assert told in capsys.readouterr().out
    assert told in (out / "README.md").read_text()
    for source in (folder, out):
        assert open_predicting(str(source)).config.model.predictor.context == "shared"
        for context, warned in (("shared", False), ("per_block", True)):
            caplog.clear()
            model = {"init_from": str(source), "predictor": SHARED | {"context": context}}
            assert read_initial_weights(config_of(model=model)).predictors
            assert ("trained with model.predictor.context=shared" in caplog.text) == warned
    file = out / "ijepa.pth.tar"
    content = torch.load(file, weights_only=True)
    content["njepa"]["predictor_context"] = "both"
    torch.save(content, file)
    with pytest.raises(ConfigError, match="one of per_block, shared, got 'both'"):
        open_weights(file)


def test_the_published_predictor_needs_no_word(run, exported):
    folder = exported("ijepa")
    assert "predictor.context" not in (folder / "README.md").read_text().split("## Use")[0]
    content = torch.load(folder / "ijepa.pth.tar", weights_only=True)
    assert content["njepa"]["predictor_context"] == "per_block"


def test_onnx(run, exported):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra [export]")
    import onnxruntime

    file = exported("onnx", "target") / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n in (1, 3):  # any number of images
        pixels = normalised(noise_images(n=3))[:n]
        tokens, pooled = session.run(None, {"pixel_values": pixels.numpy()})
        expected = own_features(run, "target")[:n]
        torch.testing.assert_close(torch.from_numpy(tokens), expected, **WITHIN)
        torch.testing.assert_close(torch.from_numpy(pooled), expected.mean(1), **WITHIN)


@pytest.mark.parametrize("form", ["timm", "transformers", "safetensors"])
def test_exports_are_read_back(run, exported, form):
    encoder = read_encoder(exported(form, "context"), "context")
    state = run[1].encoder.state_dict()
    assert encoder.state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(encoder.state[name], tensor), name
    assert (encoder.which, list(encoder.mean), list(encoder.std)) == ("context", MEAN, STD)
    torch.testing.assert_close(
        encoder.build()(noise_images()), own_features(run, "context"), rtol=0, atol=1e-6
    )


def test_card(exported):
    folder = exported("timm", "context")
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "timm"
    for part in (
        "one encoder (context)", "method njepa, 7 steps", "`photos`", "index digest dddddddddddd",
        "| knn_top1 | 41.25 % (95 %: 39.5 to 43.0) |", "equal ours within", "njepa 0.1.0",
        f"mean {MEAN} and std {STD}", "weight_decay: 0.04",
    ):  # fmt: skip
        assert part in text, part
    assert "somebody" not in text  # no path of this machine
    assert json.loads((folder / "config.json").read_text())["njepa"] == {"which": "context"}


def test_a_library_that_computes_something_else_is_an_error(run, tmp_path, monkeypatch, capsys):
    from njepa.exchange import plain

    features = plain.library_features
    monkeypatch.setattr(
        plain, "library_features", lambda *args: (features(*args)[0], features(*args)[1] + 0.01)
    )
    out = tmp_path / "out"
    assert main(["export", str(run[0]), str(out), "--format", "safetensors"]) == 1
    assert "computes other features" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written(run, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").touch()
    (tmp_path / "file").touch()
    for out, message in (
        (full, "exists already"),
        (tmp_path / "file", "exists already"),
        (tmp_path / "file" / "below", "cannot be written (Not a directory)"),
    ):
        assert main(["export", str(run[0]), str(out), "--format", "safetensors"]) == 2
        assert message in capsys.readouterr().err
    assert [p.name for p in full.iterdir()] == ["precious"]
