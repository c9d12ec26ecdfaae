"""The recipe `imagenette-vits16`, which nobody ran to the end: what it takes is there and works."""

import json
import subprocess
import sys

import pytest

from njepa import cli
from njepa.config import load_config
from njepa.config.deepspeed_file import load_deepspeed_file
from tests.support import ROOT, program_env
from tests.support.pictures import encoded, picture, write

WNIDS = [
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
    "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
]  # fmt: skip


@pytest.fixture(scope="module")
def imagenette(tmp_path_factory):
    """The layout of the published archive, with images of our own: short side 160, upper case."""
    root = tmp_path_factory.mktemp("imagenette2-160")
    for side, n in (("train", 30), ("val", 20)):
        images = (picture(i, 200 + i, 160) for i in range(n))
        names = (f"{side}/{WNIDS[i % 10]}/{WNIDS[i % 10]}_{i}.JPEG" for i in range(n))
        write(root, {name: encoded(image) for name, image in zip(names, images, strict=True)})
    return root


def test_it_is_as_long_and_as_large_as_the_published_comparison():
    """stable-pretraining, benchmarks/imagenet10: ViT-S/16 at 224 px, 200 epochs, batch 128."""
    config = load_config("imagenette-vits16", ["data.path=."])
    model, data, optim = config.model, config.data, config.optim
    assert (config.method, model.encoder, model.patch_size) == ("cjepa", "vit_small", 16)
    assert (data.image_size, optim.epochs, optim.warmup_epochs) == (224, 200, 10)
    assert config.vicreg.weight == 0.001
    text = (ROOT / "njepa/recipes/imagenette-vits16.yaml").read_text()
    assert "small.one-gpu.json" in text
    ds = load_deepspeed_file(ROOT / "njepa/recipes/small.one-gpu.json")
    assert (ds.resolve(1).total, ds.resolve(1).accumulation) == (128, 1)
    steps = 9469 // 128 * 200
    assert f"{steps:,} in all" in text
    assert steps % config.eval.every == steps % config.run.checkpoint_every == 0


@pytest.mark.slow
def test_it_steps_and_is_probed(imagenette, tmp_path, capsys):
    """Whole network, four images a step instead of 128; then the documented probe."""
    ds, run, out = tmp_path / "ds.json", tmp_path / "run", tmp_path / "imagenette.json"
    ds.write_text(json.dumps({"train_batch_size": 4, "zero_optimization": {"stage": 0}}))
    command = [
        sys.executable, str(ROOT / "njepa/train.py"), "--ds_config", str(ds),
        "--recipe", "imagenette-vits16", f"data.path={imagenette / 'train'}",
        f"data.eval_path={imagenette / 'val'}", f"run.dir={run}", "run.stop_after=2",
        f"data.cache_dir={tmp_path}", "run.device=cpu", "run.log_every=1",
    ]  # fmt: skip
    done = subprocess.run(command, env=program_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(0 < line["loss"] < 10 and line["vicreg_std"] > 0 for line in lines if "loss" in line)
    argv = ["probe", str(run), "--train", str(imagenette / "train"), "--test",
            str(imagenette / "val"), "--kind", "knn,linear", "--k", "20", "--json", str(out),
            "--cache", str(tmp_path), "--device", "cpu"]  # fmt: skip
    assert cli.main(argv) == 0
    result = json.loads(out.read_text())
    assert result["classes"] == 10
    for kind in ("knn", "linear"):
        assert result[kind]["floors"].keys() == {"untrained", "pixels"}
    assert "images of 224 px\n30 training and 20 test images, 10 classes" in capsys.readouterr().out
