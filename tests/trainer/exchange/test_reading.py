"""Encoders from every layout are the network that was written; what is wrong is named."""

import json
import os
import pickle
import re
import warnings

import pytest
import torch
from safetensors.torch import save_file

from njepa.config import ConfigError
from njepa.exchange.layouts import to_transformers
from njepa.exchange.reading import open_weights, read_encoder
from njepa.models.architecture import SIZES, Stack
from tests.support.weight_sources import (
    MEAN,
    STD,
    config_of,
    network,
    noise_images,
    published,
    write_run,
)


@pytest.fixture(scope="module")
def net():
    return network(config_of())


def refuses(source, message, which="target"):
    with pytest.raises(ConfigError, match=message) as error:
        read_encoder(source, which)
    return str(error.value)


def same(encoder, module):
    state = module.state_dict()
    assert encoder.state.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(encoder.state[name], tensor), name
    with torch.no_grad():
        assert torch.equal(encoder.build()(noise_images()), module(noise_images()))


def new_style(state):
    """The names of transformers 5's modules."""
    for old, new in (
        ("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
        (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
    ):  # fmt: skip
        state = {re.sub(old, new, name): tensor for name, tensor in state.items()}
    return state


def test_run_and_checkpoint(tmp_path, net):
    checkpoint = write_run(tmp_path / "run", config_of(), *net)
    for source in (tmp_path / "run", checkpoint, str(checkpoint)):
        for which, module in (("target", net[1]), ("context", net[0].encoder)):
            encoder = read_encoder(source, which)
            same(encoder, module)
            assert encoder.stack == Stack(32, 2, 2, 128)
            assert (encoder.patch_size, encoder.image_size) == (8, 48)
            assert (list(encoder.mean), list(encoder.std), encoder.which) == (MEAN, STD, which)
    assert open_weights(checkpoint).predictors()["predictor"].keys() == (
        net[0].predictor.state_dict().keys()
    )


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_official_layout(tmp_path, prefix):
    """A published size, whose heads no tensor tells: here ViT-Ti/16."""
    config = config_of(
        data={"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        model={"width": None, "depth": None, "heads": None, "patch_size": 16},
    )
    jepa, target = network(config)
    torch.save(published(jepa, target, prefix), tmp_path / "IN1K-vit.pth.tar")
    for which, module in (("target", target), ("context", jepa.encoder)):
        encoder = read_encoder(tmp_path / "IN1K-vit.pth.tar", which)
        same(encoder, module)
        assert encoder.stack == Stack(192, 12, 3, 768)
        assert "ImageNet's are assumed" in encoder.origin


@pytest.mark.parametrize(
    ("name", "patch", "image"),
    [("vit_huge", 14, 224), ("vit_huge", 16, 448), ("vit_giant", 16, 224)],
)
def test_sizes_of_the_official_files(name, patch, image):
    """Their shapes, without their numbers: H/14, H/16 at 448 px and g/16."""
    from njepa.exchange.weights import Weights
    from njepa.models.encoder import Encoder

    size = SIZES[name]
    stack = Stack(size.width, size.depth, size.heads, int(size.width * size.mlp_ratio))
    with torch.device("meta"):
        state = Encoder(stack, image, patch).state_dict()
    named = {f"module.{key}": tensor for key, tensor in state.items()}
    encoder = Weights("file", {"target": lambda: named}).encoder("target")
    assert encoder.stack == stack
    assert (encoder.patch_size, encoder.image_size) == (patch, image)


@pytest.mark.parametrize("style", [dict, new_style])
@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_folder(tmp_path, net, style, sharded):
    state = style(to_transformers(net[1].state_dict()))
    config = {"model_type": "ijepa", "num_attention_heads": 2, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD})
    )
    if sharded:
        names, files = sorted(state), {}
        for i, half in enumerate((names[:10], names[10:])):
            save_file({n: state[n] for n in half}, tmp_path / f"{i}.safetensors")
            files |= dict.fromkeys(half, f"{i}.safetensors")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": files}))
    else:
        save_file(state, tmp_path / "model.safetensors")
    encoder = read_encoder(tmp_path)
    same(encoder, net[1])
    assert encoder.which == "only"
    if sharded:
        index.write_text(json.dumps({"weight_map": {"pos_embed": "../0.safetensors"}}))
        refuses(tmp_path, "names files outside of its folder")


def test_half_precision_is_read_as_float32(tmp_path, net):
    state = {n: t.bfloat16() for n, t in net[1].state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit", "model_args": {"num_heads": 2}})
    )
    read = read_encoder(tmp_path).state
    for name, tensor in state.items():
        assert torch.equal(read[name], tensor.float()), name


def test_every_wrong_key_is_named(tmp_path, net):
    state = dict(net[1].state_dict())
    gone = ["blocks.0.norm1.bias", "blocks.1.attn.qkv.weight", "norm.weight"]
    for name in gone:
        del state[name]
    state |= {"head.weight": torch.zeros(3), "blocks.0.ls1.gamma": torch.zeros(32)}
    state["blocks.1.mlp.fc2.bias"] = torch.zeros(31)
    save_file(state, tmp_path / "x.safetensors", metadata={"heads": "2"})
    text = refuses(tmp_path / "x.safetensors", "6 of its keys differ")
    for name in gone:
        assert f"  missing: {name}\n" in text
    assert "  unexpected: head.weight\n" in text
    assert "  unexpected: blocks.0.ls1.gamma\n" in text
    assert "blocks.1.mlp.fc2.bias: got [31], expected [32]" in text


class Bomb:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, net, writer):
    file, sign = tmp_path / "model.pth.tar", tmp_path / "ran"
    content = {**published(*net), "opt": Bomb(sign)}
    if writer == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"opt": Bomb(sign)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one message, none of torch's beside it
        refuses(file, "is refused: .*can run code.*(posix.system|operand)")
    assert not sign.exists()


@pytest.mark.parametrize("name", ["model.pth.tar", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_files(tmp_path, net, name, damage):
    file = tmp_path / name
    if name.endswith("tar"):
        torch.save(published(*net), file)
    else:
        save_file(dict(net[1].state_dict()), file)
    whole = file.read_bytes()
    cut = {"cut": whole[: len(whole) // 2], "garbage": b"\x93garbage" * 99, "empty": b""}
    file.write_bytes(cut[damage])
    text = refuses(file, r"cannot be read \(\d+ bytes\).*copy or download it again")
    assert "internal" not in text  # nothing of torch's own advice


def test_other_things_are_named(tmp_path, net):
    refuses(tmp_path / "nowhere", "does not exist, nor is a repository of that name")
    refuses(tmp_path, "holds no weights: expected a run .* got an empty folder")
    (tmp_path / "model.onnx").touch()
    refuses(tmp_path / "model.onnx", "got a .onnx; ONNX and other graphs cannot be read back")
    torch.save({"optimizer": 1}, tmp_path / "x.pth")
    refuses(tmp_path / "x.pth", "expected the keys encoder and target_encoder .*got optimizer")
    torch.save([1], tmp_path / "x.pth")
    refuses(tmp_path / "x.pth", "must hold a dictionary, got list")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refuses(tmp_path, "expected model_type ijepa .*got vit")
    (tmp_path / "config.json").write_text("[1]")
    refuses(tmp_path, "must hold a JSON object, got list")
    run = tmp_path / "run"
    write_run(run, config_of(), *net)
    (run / "checkpoints" / "step-00000007" / "state.json").unlink()
    refuses(run, "no checkpoint that is whole:\n.*damaged: state.json: No such file")
    (run / "checkpoints" / "step-00000007").rename(run / "checkpoints" / "step-7")
    refuses(run, "has no complete checkpoint yet")


def test_not_an_encoder_of_this_family(tmp_path, net):
    file, state = tmp_path / "x.safetensors", dict(net[1].state_dict())
    save_file({"conv1.weight": torch.zeros(1)}, file)
    refuses(file, "no encoder of this family.*got 1 keys: conv1.weight; other networks cannot")
    save_file(state, file)
    refuses(file, "attention heads is not in the file, and width 32 with 2 blocks is no published")
    state["pos_embed"] = torch.zeros(1, 37, 32)  # a class token
    save_file(state, file)
    refuses(file, "square number of patches, got 37")


def test_facts_that_make_no_sense(tmp_path, net):
    """What stands beside the tensors is as little to be trusted as they are."""
    save_file(dict(net[1].state_dict()), tmp_path / "model.safetensors")
    for config, message in (
        ({"model_args": {"num_heads": "two"}}, "heads must be positive, got 'two'"),
        ({"model_args": {"num_heads": 0}}, "heads must be positive, got 0"),
        ({"model_args": {"num_heads": 5}}, "width 32 is no multiple of its 5 heads"),
        ({"model_args": [2]}, "model_args must hold a JSON object, got list"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg must hold a JSON object, got str"),
        ({"mean": [1, 2], "std": [1, 2]}, "must be three numbers each"),
        ({"mean": ["a", 1, 1], "std": [1, 1, 1]}, "must be three numbers each"),
        ({"njepa": 3}, "njepa must hold a JSON object, got int"),
    ):
        given = {"architecture": "vit", "model_args": {"num_heads": 2}, **config}
        (tmp_path / "config.json").write_text(json.dumps(given))
        refuses(tmp_path, message)


def test_a_file_is_read_with_what_stands_beside_it(tmp_path, net):
    """The file of a folder is the folder; a folder of one official file is that file."""
    save_file(dict(net[1].state_dict()), tmp_path / "model.safetensors")
    facts = {"which": "context", "heads": 2, "mean": MEAN, "std": STD}
    (tmp_path / "encoder.json").write_text(json.dumps(facts))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        encoder = read_encoder(source, "context")
        same(encoder, net[1])
        assert (encoder.which, list(encoder.mean)) == ("context", MEAN)
    alone = tmp_path / "alone"
    alone.mkdir()
    file = alone / "x.pth.tar"
    torch.save({**published(*net), "njepa": {"heads": 2, "mean": MEAN, "std": STD}}, file)
    for source in (alone, file):
        same(read_encoder(source), net[1])
    torch.save({}, alone / "y.pth.tar")
    refuses(alone, "holds no weights: expected .* or of one .pth.tar, got x.pth.tar, y.pth.tar")


def test_a_cached_repository(tmp_path, net, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    folder = tmp_path / "models--timm--vit_x" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "models--timm--vit_x" / "refs").mkdir()
    (tmp_path / "models--timm--vit_x" / "refs" / "main").write_text("abc")
    save_file(dict(net[1].state_dict()), folder / "model.safetensors", metadata={"heads": "2"})
    download = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda repo, **given: download(repo, cache_dir=tmp_path, **given)
    )
    for name in ("vit_x", "timm/vit_x"):
        encoder = read_encoder(name)
        assert torch.equal(encoder.state["norm.weight"], net[1].norm.weight)
        assert encoder.origin.startswith(f"{name} (abc), its only encoder")
    refuses("vit_y", "does not exist, nor is a repository")
