"""Compiled blocks, activation checkpointing, CUDA graphs: what changes (memory, graphs), and what
does not (losses, gradients, a resumed run)."""

from __future__ import annotations

import json

import pytest
import torch
import torch._dynamo
from torch import nn

from bench.measure import peak_bytes
from njepa.choice import Choice
from njepa.config import ConfigError
from njepa.models.attention import SDPA
from njepa.models.block import Block, run_blocks
from njepa.training.compiling import (
    choose_compilation,
    compilations,
    compile_blocks,
    eagerly,
)
from njepa.training.ema import make_target
from njepa.training.module import TrainModule
from tests.support.jobs import make_images, run_jobs
from tests.support.tiny import make_batch, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
METHODS = {
    "ijepa": ("ijepa", {}),
    "ncjepa": ("ncjepa", {"noise": {"predictors": "unshared"}}),
    "tied": ("njepa", {"noise": {"space": "encoder_tied", "mask_token": "shared"}}),
    "shared": (
        "ncjepa",
        {"model": {"predictor": {"width": 24, "depth": 2, "heads": 2, "context": "shared"}}},
    ),
    "one": ("njepa", {"noise": {"predictors": "shared", "draw": "shared"}}),
    "single": (
        "ncjepa",
        {"noise": {"predictors": "single"}, "vicreg": {"on": "context_vs_target"}},
    ),
}


def parts(name, impl="auto", **sections):
    method, more = METHODS[name]
    config = tiny_config(method, impl={"default": impl}, **(more | sections))
    module = TrainModule(config)
    return module, make_target(module.jepa.encoder), make_batch(config)


# One graph


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("ijepa", "auto"),
        ("ncjepa", "auto"),
        ("ncjepa", "reference"),
        ("tied", "auto"),
        ("shared", "auto"),
        ("one", "auto"),
        ("single", "auto"),
    ],
)
def test_no_graph_breaks_in_the_step(name, impl):
    """The target encoder is one graph, and so is the whole module (network and losses) where
    VICReg's statistics need no other rank. DeepSpeed's engine, AdamW and the EMA lie outside."""
    module, target, batch = parts(name, impl)
    h = target(batch.images)
    for part, inputs in (
        (target, (batch.images,)),
        (module, (batch, h)),
    ):
        torch._dynamo.reset()
        found = torch._dynamo.explain(part)(*inputs)
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    torch._dynamo.reset()


# What is chosen


@pytest.mark.parametrize(
    ("compile_", "static", "stage", "device", "mode"),
    [
        ("auto", True, 1, CUDA, "blocks"),
        ("auto", False, 1, CUDA, "off"),
        ("auto", True, 3, CUDA, "off"),
        ("auto", True, 1, CPU, "off"),
        ("off", True, 1, CUDA, "off"),
        ("blocks", False, 2, CUDA, "blocks"),
        ("blocks", False, 0, CPU, "blocks"),
    ],
)
def test_choice(compile_, static, stage, device, mode):
    config = tiny_config(run={"compile": compile_}, mask={"static_shapes": static})
    chosen = choose_compilation(config, stage, device)
    assert chosen.name == mode
    assert str(chosen) == f"{mode} ({chosen.reason})"


def test_what_cannot_run_is_refused():
    with pytest.raises(ConfigError, match=r"run\.compile=blocks does not work with .*stage 3"):
        choose_compilation(tiny_config(run={"compile": "blocks"}), 3, CPU)
    ragged = {"ragged": True}
    with pytest.raises(ConfigError, match=r"run\.compile=blocks does not work with mask\.ragged"):
        choose_compilation(tiny_config(run={"compile": "blocks"}, mask=ragged), 0, CPU)
    assert choose_compilation(tiny_config(mask=ragged), 0, CUDA).name == "off"
    with pytest.raises(ConfigError, match=r"run\.cuda_graphs=target needs a CUDA device, got cpu"):
        choose_compilation(tiny_config(run={"cuda_graphs": "target"}), 0, CPU)
    with (
        torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)),
        pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*run\.compile=off"),
    ):
        choose_compilation(tiny_config(run={"compile": "blocks"}), 0, CPU)


# How often


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stack(depth, width=32):
    torch.manual_seed(0)
    return nn.ModuleList(Block(width, 2, 4 * width) for _ in range(depth))


def forward(blocks, tokens):
    x = torch.ones(2, tokens, 32, requires_grad=True)
    return run_blocks(blocks, x, SDPA.sequences(2, tokens), recompute=False)


def test_all_layers_share_one_compilation_for_each_shape(fresh_dynamo, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", with_backend("aot_eager"))
    blocks = stack(4)
    compile_blocks([blocks], static_shapes=True)
    before = compilations()
    for done, tokens in enumerate((5, 6, 7), start=1):
        for _ in range(2):
            forward(blocks, tokens)
            assert compilations() - before == done


@pytest.mark.parametrize("context", ["per_block", "shared"])
def test_predictors_share_their_compilations_and_have_one_more_for_the_last_block(
    fresh_dynamo, monkeypatch, context
):
    monkeypatch.setattr(torch.nn.Module, "compile", with_backend("aot_eager"))
    part = {"width": 24, "depth": 3, "heads": 2, "context": context}
    config = tiny_config("njepa", model={"predictor": part})
    module, batch = TrainModule(config), make_batch(config)
    with torch.no_grad():
        h = make_target(module.jepa.encoder)(batch.images)
    predictors = [module.jepa.predictor, module.jepa.noise_predictor]
    expected = module(batch, h)[0]
    compile_blocks(predictors, static_shapes=True)
    before = compilations()
    for _ in range(2):
        torch.testing.assert_close(module(batch, h)[0], expected, rtol=1e-6, atol=0)
        assert compilations() - before == 2
    shorter = batch._replace(masks=batch.masks._replace(context_idx=batch.masks.context_idx[:, 1:]))
    module(shorter, h)
    assert compilations() - before == 4


def test_without_static_shapes_two_compilations_serve_every_shape(fresh_dynamo, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", with_backend("aot_eager"))
    blocks = stack(2)
    compile_blocks([blocks], static_shapes=False)
    before = compilations()
    for tokens in range(5, 25):
        forward(blocks, tokens)
    assert compilations() - before == 2


def test_too_many_shapes_are_an_error_and_not_a_silent_return_to_eager(fresh_dynamo, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", with_backend("aot_eager"))
    blocks = stack(1)
    with torch._dynamo.config.patch(accumulated_recompile_limit=3):
        compile_blocks([blocks], static_shapes=True)
        for tokens in (5, 6, 7):
            forward(blocks, tokens)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            forward(blocks, 8)


def test_nothing_compiles_inside_eagerly(fresh_dynamo, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", with_backend("aot_eager"))
    blocks = stack(2)
    expected = forward(blocks, 5)
    compile_blocks([blocks], static_shapes=True)
    before = compilations()
    with eagerly(Choice("blocks", "test")):
        assert torch.equal(forward(blocks, 5), expected)
    assert compilations() == before
    forward(blocks, 5)
    assert compilations() == before + 1


def with_backend(backend):
    """``nn.Module.compile`` without the compiler at its end, which these tests do not need."""
    original = torch.nn.Module.compile
    return lambda self, **options: original(self, backend=backend, **options)


# training

STEPS = 12
# On 8x8 patches targets are 3x3, and context blocks 7x7 or 8x8: two shapes.
SHAPES = [
    "mask.static_shapes=true", "mask.context_scale=[0.8, 1.0]", "mask.target_scale=[0.2, 0.2]",
    "mask.aspect_ratio=[1.0, 1.0]",
]  # fmt: skip
BLOCKS, RECOMPUTE = "run.compile=blocks", "model.checkpoint_blocks=true"


def job(root, name, overrides, stage=0, folder=None, steps=STEPS):
    return {
        "name": name,
        "grads": steps < STEPS,
        "overrides": [
            f"data.path={root}/images", f"data.cache_dir={root}/cache",
            f"run.dir={root}/runs/{folder or name}", "method=ncjepa", f"run.max_steps={steps}",
            *overrides,
        ],
        "ds": {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 1.0,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    make_images(folder / "images", 26)
    return folder


@pytest.fixture(scope="module")
def compiled(root):
    """Runs of one process (which share compiled blocks), and one that a later process resumes."""
    first = run_jobs(
        [
            job(root, "blocks", [*SHAPES, BLOCKS]),
            job(root, "eager", SHAPES),
            job(root, "zero1", [*SHAPES, BLOCKS, RECOMPUTE], stage=1),
            job(root, "cut", [*SHAPES, BLOCKS, "run.stop_after=5"]),
        ],
        1,
        root / "first",
    )
    resumed = job(root, "resumed", [*SHAPES, BLOCKS, "run.resume=true"], folder="cut")
    return first | run_jobs([resumed], 1, root / "second")


def lines(root, run):
    return [json.loads(x) for x in (root / "runs" / run / "metrics.jsonl").open()]


@pytest.mark.slow
@pytest.mark.multirank
def test_compilations_stop_at_the_number_of_shapes(root, compiled):
    logged = [line.get("compilations") for line in lines(root, "blocks")]
    shapes = {(x["k_context"], x["k_target"]) for x in lines(root, "blocks")}
    contexts, queries = {c for c, _ in shapes}, {c + t for c, t in shapes}
    # The target encoder has one shape; both predictors, as wide as each other, share theirs, and
    # their only block is their last.
    assert len(shapes) == 2
    expected = 1 + len(contexts) + len(queries)
    counts = [count for count in logged if count is not None]
    assert counts == sorted(set(counts))  # a line where it grew
    assert counts[-1] == expected
    summary = json.loads((root / "runs/blocks/summary.json").read_text())
    assert (summary["compile"], summary["compilations"]) == ("blocks", expected)
    seen, grown = set(), []
    for line in lines(root, "blocks"):
        fresh = (line["k_context"], line["k_target"]) not in seen
        seen.add((line["k_context"], line["k_target"]))
        grown.append("compilations" in line)
        assert fresh or not grown[-1]
    assert not all(grown)
    eager = json.loads((root / "runs/eager/summary.json").read_text())
    assert (eager["compile"], eager["compilations"]) == ("off", 0)


@pytest.mark.slow
@pytest.mark.multirank
def test_compiled_losses_are_the_eager_ones_up_to_rounding(compiled):
    eager, blocks = (torch.tensor(compiled[name]["losses"]) for name in ("eager", "blocks"))
    assert len(eager) == STEPS
    # One rounding of fp32 is 6e-8; AdamW's division by tiny second moments makes more of it.
    torch.testing.assert_close(blocks, eager, rtol=2e-5, atol=0)
    assert (eager.diff().abs() > 1e-3).all()  # unlike steps that change nothing


@pytest.mark.slow
@pytest.mark.multirank
def test_zero_1_and_recomputed_activations_train_alike(compiled):
    blocks, zero1 = (torch.tensor(compiled[name]["losses"]) for name in ("blocks", "zero1"))
    torch.testing.assert_close(zero1, blocks, rtol=2e-5, atol=0)


@pytest.mark.slow
@pytest.mark.multirank
def test_a_resumed_compiled_run_is_the_run_that_was_not_stopped(compiled):
    assert compiled["cut"]["losses"] + compiled["resumed"]["losses"] == compiled["blocks"]["losses"]
    for name, tensor in compiled["blocks"]["target"].items():
        assert torch.equal(compiled["resumed"]["target"][name], tensor), name


# Activation checkpointing


@pytest.mark.slow
@pytest.mark.multirank
def test_recomputed_activations_give_the_same_bits_under_every_zero_stage(root):
    stages = (0, 1, 2, 3)
    records = run_jobs(
        [
            job(root, f"{name}{stage}", overrides, stage, steps=2)
            for stage in stages
            for name, overrides in (("kept", []), ("recomputed", [RECOMPUTE]))
        ],
        2,
        root / "two",
    )
    for stage in stages:
        kept, recomputed = records[f"kept{stage}"], records[f"recomputed{stage}"]
        assert recomputed["losses"] == kept["losses"]
        for a, b in zip(recomputed["grads"], kept["grads"], strict=True):
            assert a.keys() == b.keys()
            for name in a:
                assert torch.equal(a[name], b[name]), (stage, name)


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_gradients_are_equal_and_peak_memory_is_lower(name):
    deep = {"encoder": "vit_tiny", "width": 32, "depth": 8, "heads": 2, "patch_size": 8,
            "predictor": {"width": 24, "depth": 8, "heads": 2,
                          "context": "shared" if name == "shared" else "per_block"}}  # fmt: skip
    peaks, gradients = [], []
    for recompute in (False, True):
        module, target, batch = parts(name, model=deep | {"checkpoint_blocks": recompute})
        h = target(batch.images)
        peaks.append(peak_bytes(lambda: module(batch, h)[0].backward(), CPU))  # noqa: B023 (called here)
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    for n, gradient in gradients[0].items():
        assert torch.equal(gradients[1][n], gradient), n
    assert peaks[1] < 0.6 * peaks[0], peaks
