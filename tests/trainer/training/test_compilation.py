"""Compiled blocks: one graph, the choice, how often; recomputed activations: memory, gradients."""

from __future__ import annotations

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
