"""Weights that cannot be used: one message from each command that reads weights, nothing left."""

import os

import pytest
import torch
from safetensors.torch import save_file

from njepa import cli
from tests.support import ROOT
from tests.support.subjects import make_stripes
from tests.support.weight_sources import MEAN, STD, config_of, network, published, write_run

#: A configuration that the good run fits.
FITS = [
    "method=ijepa", "model.width=32", "model.depth=2", "model.heads=2",
    "model.predictor={width: 24, depth: 2, heads: 3}", f"data.mean={MEAN}", f"data.std={STD}",
]  # fmt: skip


class Bomb:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    config = config_of()
    jepa, target = network(config)
    write_run(root / "run", config, jepa, target)
    make_stripes(root / "images", 12)
    save_file({"conv1.weight": torch.zeros(8, 3, 7, 7)}, root / "resnet.safetensors")
    torch.save({"model": {"cls_token": torch.zeros(1)}}, root / "mae.pth")
    state = dict(target.state_dict())
    token = {"cls_token": torch.zeros(1, 1, 32), "pos_embed": torch.zeros(1, 37, 32)}
    save_file(state | token, root / "token.safetensors", metadata={"heads": "2"})
    layers = {"blocks.0.ls1.gamma": torch.zeros(32), "norm.bias": torch.zeros(31)}
    save_file(state | layers, root / "layers.safetensors", metadata={"heads": "2"})
    torch.save({**published(jepa, target), "opt": Bomb(root / "ran")}, root / "bomb.pth.tar")
    torch.save(published(jepa, target), root / "cut.pth.tar")
    cut = (root / "cut.pth.tar").read_bytes()
    (root / "cut.pth.tar").write_bytes(cut[: len(cut) // 2])
    (root / "page.safetensors").write_text("<html>404</html>")
    return root


@pytest.fixture(params=["probe", "export", "train"])
def refused(world, request, monkeypatch, capfd):
    """Give a source to a command; returns its message."""
    monkeypatch.chdir(world)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(source, *more):
        before = sorted(p.name for p in world.iterdir())
        argv = {
            "probe": [source, "--train", "images", "--test", "images", "--k", "5"],
            "export": [source, "out", "--format", "timm"],
            "train": ["--ds_config", str(ROOT / "ds.json"), "data.path=images", "run.dir=out",
                      "data.cache_dir=out-cache", *FITS, f"model.init_from={source}", *more],
        }[request.param]  # fmt: skip
        assert cli.main([request.param, *argv]) == 2
        out, err = capfd.readouterr()
        assert not out
        assert err.startswith("njepa: ")
        assert not any(word in err for word in ("Traceback", "Warning", "WARNING"))
        assert sorted(p.name for p in world.iterdir()) == before
        return err

    return run


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("resnet.safetensors", ["no encoder of this family: expected patch_embed.proj.weight",
                                "got 1 keys: conv1.weight; other networks cannot be read"]),
        ("mae.pth", ["expected the keys encoder and target_encoder", "got model; ",
                     "save its state dict alone"]),
        ("token.safetensors", ["a square number of patches, got 37; a class token"]),
        ("layers.safetensors", ["2 of its keys differ", "  unexpected: blocks.0.ls1.gamma\n",
                                "norm.bias: got [31], expected [32]", "remove what is not part"]),
        ("bomb.pth.tar", ["is refused: expected tensors and plain values", "can run code",
                          "save its state dicts alone"]),
        ("cut.pth.tar", ["cannot be read (", "copy or download it again"]),
        ("page.safetensors", ["cannot be read (16 bytes)", "copy or download it again"]),
        ("nowhere", ["does not exist", "expected a run folder, a checkpoint"]),
        ("images", ["holds no weights: expected a run (config.yaml)", "got class0, class1"]),
        ("images/class0/0000.jpg", ["expected weights in a .safetensors, .pth.tar", "got a .jpg"]),
    ],
)  # fmt: skip
def test_one_message(world, refused, source, messages):
    err = refused(source)
    for message in messages:
        assert message in err
    assert not (world / "ran").exists()


@pytest.mark.parametrize("refused", ["train"], indirect=True)
def test_an_encoder_of_another_patch_size(refused):
    err = refused("run", "model.patch_size=4")
    assert "does not fit the configuration: got model.patch_size=8, expected model.pa" in err
    assert err.endswith("set model.patch_size=8\n")
