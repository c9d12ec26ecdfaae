"""Bad input ends with one clear message and status 2, before any training, and leaves nothing."""

import json

import pytest
from PIL import Image

from njepa import train
from tests.support.jobs import TINY, make_images


@pytest.fixture
def attempt(tmp_path, capfd, monkeypatch):
    """Run the command line in a folder with 12 images; returns (status, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    make_images(tmp_path / "images", 12)

    def run(*overrides, ds=None, options=()):
        content = {"train_micro_batch_size_per_gpu": 4} if ds is None else ds
        (tmp_path / "ds.json").write_text(json.dumps(content))
        common = [*TINY, "data.path=images", "data.cache_dir=cache", "run.dir=run"]
        status = train.main([*options, *common, *overrides])
        assert not (tmp_path / "run").exists()
        return status, capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=nowhere"], "data: nowhere does not exist"),
        (["data.path=empty"], "no image in the folder"),
        (["data.path=broken"], "none of the 2 images of"),
        (["data.path=images/class0/0000.jpg"], "data.path takes a folder of images"),
        (["data.image_size=30"], "multiple of model.patch_size=4, got 30"),
        (["model.encoder=vit_hug"], "did you mean 'vit_huge'?"),
        (["model.heads=5"], "must be a multiple of model.heads=5"),
        (["mask.min_keep=30"], "min_keep"),
        (["mask.compat=upstream", "mask.min_keep=12"], "min_keep"),
        (
            ["optim.epochs=1", "run.max_steps=null", "optim.warmup_epochs=3"],
            "got 9 warm-up steps of 3",
        ),
        (["noise.levels=4"], "noise.levels: removed: "),
        (["noise.sigma=[5, 4, 3, 2, 1]"], "give at most 4 values or raise mask.n_targets"),
        (["noise.sigma=big"], "noise.sigma must be a number >= 0, 'edm' or a list"),
        (["noise.predictors=single", "noise.consistency=1"], "set noise.consistency=0"),
        (["noise.sigma=[1, 0]", "noise.draw=shared"], "set one number or noise.draw=per_block"),
        (["vicreg.on=tokens"], "'pred_blocks' or 'context_vs_target', got 'tokens'"),
        (["data.eval_path=other"], "the classes of the test images"),
        (["impl.default=triton"], "impl.default=triton"),
        (["optim.lrr=1"], "did you mean 'lr'?"),
    ],
)
def test_messages(attempt, tmp_path, overrides, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "x.jpg").write_bytes(b"")
    (tmp_path / "broken" / "a" / "y.jpg").write_text("not an image")
    for name in ("lion", "tiger"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "other" / name / "1.jpg")
    status, stderr = attempt(*overrides)
    assert status == 2
    assert message in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("ds", "overrides", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 1}, ["method=cjepa"], "at least 2 over all ranks"),
        ({"train_micro_batch_size_per_gpu": 64}, [], "has 12 images, but one step needs 64"),
        ({}, [], "must give train_batch_size"),
        ({"optimizer": {"type": "Adam"}}, [], "the recipe owns the optimizer"),
        ({"train_batch_size": 3, "train_micro_batch_size_per_gpu": 2}, [], "3 is not a multiple"),
    ],
)  # fmt: skip
def test_messages_about_the_batch(attempt, ds, overrides, message):
    status, stderr = attempt(*overrides, ds=ds)
    assert status == 2
    assert message in stderr


def test_a_fault_of_ours_is_a_traceback(attempt, monkeypatch):
    """Only what names the user's input is a message; any other ValueError keeps its place."""
    monkeypatch.setattr("njepa.data.sources.find_source", lambda *_: int("a"))
    with pytest.raises(ValueError, match="invalid literal"):
        attempt("run.max_steps=1")


def test_no_cuda(attempt):
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    status, stderr = attempt("run.device=cuda")
    assert status == 2
    assert "torch sees no CUDA device; set run.device=cpu or auto" in stderr
