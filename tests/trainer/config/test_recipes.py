"""Recipes that come with the package: the papers' numbers, and that they build, plan and learn."""

import re

import pytest
import torch

from njepa.cli import main
from njepa.config import load_config, recipe_names
from njepa.config.deepspeed_file import load_deepspeed_file
from njepa.data.batch import Batch, Masks
from njepa.draws.masks import MaskSampler
from njepa.models.architecture import architecture
from njepa.training.ema import make_target
from njepa.training.module import TrainModule
from tests.support import ROOT
from tests.support.tiny import noise_of

FOLDER = ROOT / "njepa/recipes"

#: facebookresearch/ijepa, configs/*.yaml; the paper's appendix for B and L.
IJEPA = {
    "method": "ijepa",
    "data.image_size": 224,
    "data.crop_scale": (0.3, 1.0),
    "mask.context_scale": (0.85, 1.0),
    "mask.target_scale": (0.15, 0.2),
    "mask.aspect_ratio": (0.75, 1.5),
    "mask.n_targets": 4,
    "mask.min_keep": 10,
    "mask.allow_overlap": False,
    "mask.compat": "fixed",  # our own default, in all of them
    "model.encoder": "vit_base",
    "model.patch_size": 16,
    "model.predictor.depth": 6,
    "model.predictor.width": 384,
    "noise.weight": 0,
    "noise.consistency": 0,
    "vicreg.weight": 0,
    "optim.epochs": 600,
    "optim.warmup_epochs": 15,
    "optim.lr_start": 1e-4,
    "optim.lr": 1e-3,
    "optim.lr_shape": "cosine",
    "optim.lr_final": 1e-6,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_final": 0.4,
    "optim.betas": (0.9, 0.999),
    "optim.ema": (0.996, 1.0),
    "optim.schedule_scale": 1,
    "eval.which": "target",
}
#: arXiv 2507.15216: sections 4.2 and 4.4, algorithm 1, table 2.
NJEPA = IJEPA | {
    "method": "njepa",
    "noise.weight": 0.1,
    "noise.consistency": 0.1,
    "noise.consistency_stop": "none",
    "noise.sigma": 0.5,
    "noise.draw": "per_block",
    "noise.predictors": "unshared",
    "noise.mask_token": "unshared",
    "noise.space": "predictor",
    "optim.warmup_epochs": 40,
    "optim.lr_shape": "constant",
    "optim.schedule_scale": 1.25,
    "eval.which": "context",
}
PUBLISHED = {
    "in1k-vitb16": IJEPA,
    "in1k-vitl16": IJEPA | {"model.encoder": "vit_large", "model.predictor.depth": 12},
    "in1k-vith14": IJEPA
    | {
        "model.encoder": "vit_huge",
        "model.patch_size": 14,
        "model.predictor.depth": 12,
        "optim.epochs": 300,
        "optim.warmup_epochs": 40,
        "optim.lr_start": 2e-4,
    },
    # arXiv 2410.19560: I-JEPA's recipe and .001 (25 sim + 25 std + 1 cov).
    "in1k-vitb16-cjepa": IJEPA
    | {
        "method": "cjepa",
        "vicreg.weight": 0.001,
        "vicreg.sim": 25,
        "vicreg.std": 25,
        "vicreg.cov": 1,
        "vicreg.gamma": 1,
        "vicreg.on": "pred_blocks",
    },
    "in1k-vitb16-njepa": NJEPA,
    "in1k-vitb16-njepa-100ep": NJEPA | {"optim.epochs": 100},
}
#: Published batch, the file that gives it on 8 GPUs, heads of the predictor.
BATCH = {
    "in1k-vitb16": (2048, "in1k.zero1.json", 12),
    "in1k-vitl16": (2048, "in1k.zero1.json", 16),
    "in1k-vith14": (2048, "in1k.zero1.json", 16),
    "in1k-vitb16-cjepa": (2048, "in1k.zero1.json", 12),
    "in1k-vitb16-njepa": (1024, "in1k-1024.zero1.json", 12),
    "in1k-vitb16-njepa-100ep": (128, "small.zero1.json", 12),
}


def test_every_published_recipe_is_in_the_table():
    assert sorted(PUBLISHED) == [name for name in recipe_names() if name.startswith("in1k")]
    assert PUBLISHED.keys() == BATCH.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_papers(name):
    config = load_config(name, ["data.path=."])
    got = {}
    for key in PUBLISHED[name]:
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        got[key] = value
    assert got == PUBLISHED[name]


@pytest.mark.parametrize("name", BATCH)
def test_batch_and_heads_are_the_papers(name):
    total, file, heads = BATCH[name]
    sizes = load_deepspeed_file(FOLDER / file).resolve(8)
    assert (sizes.total, sizes.accumulation) == (total, 1)
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"Effective batch {total}" in text
    named = re.findall(r"[\w.-]+\.json", text)
    assert file in named
    assert all((FOLDER / other).is_file() for other in named)
    config = load_config(name, ["data.path=."])
    assert architecture(config).predictor.heads == heads


@pytest.mark.parametrize("name", recipe_names())
def test_builds_and_has_a_finite_loss(name):
    """One block in encoder and predictors; width, heads, grid and objective are the recipe's."""
    config = load_config(
        name,
        ["data.path=.", "model.depth=1", "model.predictor.depth=1", "impl.default=reference"],
    )
    images, (height, width) = 2, config.grid
    MaskSampler(config.mask, config.grid, config.run.seed, images)  # raises where nothing fits
    side, m = config.data.image_size, config.mask.n_targets
    g = torch.Generator().manual_seed(0)
    rows = torch.rand(images, 1 + m, height * width, generator=g).argsort(-1)
    ids = torch.arange(images)
    noise = noise_of(config, torch.full((images, m), 0.5), 0, ids)
    batch = Batch(
        images=torch.randint(0, 256, (images, side, side, 3), generator=g, dtype=torch.uint8),
        masks=Masks(rows[:, 0, :12], rows[:, 1:, :5]),
        noise=noise if config.noise.active else None,
        sample_ids=ids,
        micro_step=0,
    )
    module = TrainModule(config)
    h = make_target(module.jepa.encoder)(batch.images)
    loss, metrics = module(batch, h)
    loss.backward()
    assert torch.isfinite(loss)
    for parameter, value in module.named_parameters():
        assert (value.grad is not None) == value.requires_grad, parameter
        assert value.grad is None or torch.isfinite(value.grad).all(), parameter
    if name not in PUBLISHED:
        return
    noisy, expected = config.method == "njepa", metrics["loss_clean"]
    assert (module.jepa.noise_predictor is not None) == noisy
    if noisy:
        expected = expected + 0.1 * metrics["loss_noise"] + 0.1 * metrics["loss_consistency"]
    if config.method == "cjepa":
        terms = [metrics[f"vicreg_{term}"] for term in ("inv", "std", "cov")]
        expected = expected + 0.001 * (25 * terms[0] + 25 * terms[1] + terms[2])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", BATCH)
def test_plan_takes_it(name, capsys):
    command = ["plan", "--recipe", name, "--ds_config", str(FOLDER / BATCH[name][1])]
    assert main([*command, "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}, {PUBLISHED[name]['method']}, ")
    assert f"{BATCH[name][0] // 8} images a GPU" in out


def test_info_names_it(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in recipe_names():
        assert f"  {name}: " in out
    assert "in1k-vitb16-njepa-100ep: njepa, vit_base/16 at 224 px, 100 epochs" in out
