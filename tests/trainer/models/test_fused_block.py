"""Blocks of fused ops are the plain ones: names, weights, values, gradients, in every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch._dynamo
from njepa_kernels.testing import assert_within_baseline, stack_values
from torch import Tensor, nn

from njepa.config.deepspeed_file import BatchSizes, parse_deepspeed
from njepa.data.batch import Lengths
from njepa.evaluation.features import pooled_views
from njepa.models.architecture import Stack
from njepa.models.attention import SDPA, Sequences
from njepa.models.block import (
    Block,
    FusedBlock,
    FusedLastNorm,
    Layout,
    Pending,
    build_blocks,
    run_blocks,
)
from njepa.models.shared_context import Segments
from njepa.training.compiling import compile_blocks
from njepa.training.ema import low_target, make_target
from njepa.training.impls import choose_impls
from njepa.training.module import TrainModule
from njepa.training.zero import engine_config
from tests.support.packed_attention import ATTENTION
from tests.support.tiny import make_batch, tiny_config

CPU, DOUBLE = torch.device("cpu"), torch.float64
B, M, KC, KT, D = 3, 2, 7, 4, 24
SIZE = Stack(D, 2, 2, 4 * D)
FUSED = {"fused_block": True}


def stack(fused: bool, seed: int = 0) -> nn.ModuleList:
    blocks, g = build_blocks(SIZE, fused, "auto"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in blocks.named_parameters():
            center = 1.0 if name.endswith(("norm1.weight", "norm2.weight")) else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=g))
    return blocks


def layouts() -> dict[str, tuple[Layout, Layout]]:
    """By name: the layout of all blocks but the last, and of the last."""
    found: dict[str, tuple[Layout, Layout]] = {}
    target_idx = torch.zeros(B, M, KT, dtype=torch.int64)
    for counts in (None, (7, 2, 5)):
        lengths = None if counts is None else Lengths(counts, torch.tensor(counts))
        for kernel, attention in ATTENTION.items():
            name = f"{kernel}-{'dense' if counts is None else 'ragged'}"
            whole = attention.sequences(M * B, KC + KT, lengths, tail=KT)
            found[name] = whole, attention.sequences(M * B, KT).over(whole)
            segments = Segments.of(attention, torch.zeros(B, KC, D), target_idx, lengths)
            found[f"{name}-shared"] = segments, segments.of_queries_alone()
    return found


LAYOUTS = layouts()


Run = Callable[[nn.ModuleList, Tensor | Pending, Layout], Tensor | Pending]


def kept(blocks: nn.ModuleList, x: Tensor | Pending, layout: Layout) -> Tensor | Pending:
    return run_blocks(blocks, x, layout, recompute=False)


def recomputed(blocks: nn.ModuleList, x: Tensor | Pending, layout: Layout) -> Tensor | Pending:
    return run_blocks(blocks, x, layout, recompute=True)


def one_by_one(blocks: nn.ModuleList, x: Tensor | Pending, layout: Layout) -> Tensor | Pending:
    for block in blocks:
        x = block(added(x), layout)
    return x


def added(x: Tensor | Pending) -> Tensor:
    return x.stream + x.branch if isinstance(x, Pending) else x


def evaluate(
    blocks: nn.ModuleList, name: str, seed: int, low: bool = False, run: Run = kept
) -> dict[str, Tensor]:
    """Output and gradients of input and parameters, in the type of the parameters."""
    everything, queries = LAYOUTS[name]
    dtype = next(blocks.parameters()).dtype
    g = torch.Generator().manual_seed(100 + seed)
    shape = (B * KC + M * B * KT, D) if isinstance(everything, Segments) else (M * B, KC + KT, D)
    given = torch.randn(shape, generator=g).to(dtype).requires_grad_()
    x = everything.enter(given) if isinstance(everything, Sequences) else given
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = added(run(blocks[-1:], run(blocks[:-1], x, everything), queries))
    cotangent = torch.randn(out.shape, generator=g).to(dtype)
    named = dict(blocks.named_parameters())
    grads = torch.autograd.grad(out, [given, *named.values()], cotangent)
    return {"out": out.detach(), **dict(zip(("x", *named), grads, strict=True))}


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "autocast"])
def test_values_and_gradients_are_within_the_baseline(low: bool) -> None:
    """Of the plain blocks, as the ops are of their compositions."""
    for name in LAYOUTS:
        results = []
        for fused, dtype in ((True, torch.float32), (False, torch.float32), (False, DOUBLE)):
            results.append(stack_values([
                evaluate(stack(fused, seed).to(dtype), name, seed, low and dtype != DOUBLE)
                for seed in range(3)
            ]))  # fmt: skip
        got, plain, exact = results
        precision = torch.bfloat16 if low else torch.float32
        for key, value in got.items():
            assert value.dtype == plain[key].dtype
            what = f"{name} {key}"
            assert_within_baseline(value, plain[key], exact[key], precision, what)
            assert float(exact[key].norm()) > 1e-3, what


def test_recomputed_gradients_have_the_same_bits() -> None:
    """Of blocks whose sums are made between them: the backward rounds one addition more."""
    for name in LAYOUTS:
        blocks = stack(True)
        once, again = (evaluate(blocks, name, 0, run=run) for run in (one_by_one, recomputed))
        for key, value in once.items():
            assert torch.equal(again[key], value), (name, key)


def test_the_stream_stays_wide_and_the_products_get_what_they_compute_in() -> None:
    block, sequences = stack(True)[0], SDPA.sequences(2, 5)
    seen: list[torch.dtype] = []
    for layer in (block.attn.qkv, block.mlp.fc1, block.mlp.fc2):
        layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    x = torch.randn(2, 5, D)
    low, wide = torch.bfloat16, torch.float32
    with torch.autocast("cpu", low):
        pending = block(x, sequences)
        assert [t.dtype for t in pending] == [low, wide]
        assert [t.dtype for t in block(pending, sequences)] == [low, wide]
        assert FusedLastNorm(D, "auto")(pending).dtype == wide
    assert [t.dtype for t in block(x, sequences)] == [wide, wide]
    assert [t.dtype for t in block.bfloat16()(x.bfloat16(), sequences)] == [low, low]
    assert seen == [low] * 6 + [wide] * 3 + [low] * 3


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "autocast"])
def test_the_norm_behind_a_block_adds_what_is_pending(low: bool) -> None:
    """The stream that is passed on has the bits of an addition by torch."""
    norm, last = stack(True)[1].norm1, FusedLastNorm(D, "auto")
    branch = torch.randn(2, 5, D).to(torch.bfloat16 if low else torch.float32)
    stream = torch.randn(2, 5, D)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        pending = Pending(branch, stream)
        assert torch.equal(norm(pending).residual, stream + branch)
        assert torch.equal(norm(pending).out, norm(stream + branch).out.to(branch.dtype))
        assert torch.equal(last(pending), last(stream + branch))


def test_a_recomputed_block_keeps_one_tensor() -> None:
    """A sum of a stream in fp32, not that and what is to be added to it."""
    seen: list[object] = []
    blocks, sequences = stack(True), SDPA.sequences(2, 5)
    blocks[1].register_forward_pre_hook(lambda _, args: seen.append(type(args[0])))
    for recompute in (False, True):
        run_blocks(blocks, torch.randn(2, 5, D).requires_grad_(), sequences, recompute)
    with torch.no_grad():
        run_blocks(blocks, torch.randn(2, 5, D), sequences, True)
    assert seen == [Pending, torch.Tensor, Pending]


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "autocast"])
def test_a_compiled_block_is_one_graph(low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **given: compiler(self, backend="aot_eager", **given)
    )
    blocks = stack(True)
    for name in ("padded-dense", "padded-dense-shared"):
        expected = evaluate(blocks, name, 0, low)
        compile_blocks([blocks], static_shapes=True)  # an error where it takes a second graph
        for key, value in evaluate(blocks, name, 0, low).items():
            torch.testing.assert_close(value, expected[key], msg=f"{name} {key}")


SHARED = {"predictor": {"width": 24, "depth": 2, "heads": 2, "context": "shared"}}


@pytest.mark.parametrize(("method", "model"), [("ijepa", {}), ("ncjepa", {}), ("njepa", SHARED)])
def test_a_model_has_the_same_state_and_loss(method: str, model: dict[str, Any]) -> None:
    config, fused_config = (tiny_config(method, model=model | more) for more in ({}, FUSED))
    plain, fused = TrainModule(config), TrainModule(fused_config)
    ours = [module for module in fused.modules() if isinstance(module, Block)]
    assert ours
    assert all(type(block) is FusedBlock for block in ours)
    assert not any(isinstance(module, FusedBlock) for module in plain.modules())
    state, fused_state = plain.state_dict(), fused.state_dict()
    assert list(fused_state) == list(state)
    assert all(torch.equal(fused_state[name], value) for name, value in state.items())
    losses, gradients, batch = [], [], make_batch(config)
    for module in (plain, fused):
        with torch.no_grad():
            h = make_target(module.jepa.encoder)(batch.images)
        loss, _ = module(batch, h)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_features_of_the_last_four_blocks_are_those_of_plain_ones() -> None:
    """A hook gets what a block leaves pending; the last norm takes it."""
    images, views = make_batch(tiny_config()).images, []
    for model in ({}, FUSED):
        encoder = TrainModule(tiny_config(model=model)).jepa.encoder
        with torch.no_grad():
            views.append(pooled_views(encoder)(images))
    for name, expected in views[0].items():
        torch.testing.assert_close(views[1][name], expected, rtol=1e-5, atol=1e-6)


def test_the_target_in_bf16_has_the_bits_of_its_autocast() -> None:
    config = tiny_config(model=FUSED)
    target, images = make_target(TrainModule(config).jepa.encoder), make_batch(config).images
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = target(images), low_target(target).encoder(images)
    assert expected.dtype == torch.float32
    assert torch.equal(got, expected)


def test_their_implementation_is_chosen_and_named_with_the_others() -> None:
    ops = {"add_layer_norm", "bias_gelu"}
    assert ops <= choose_impls(tiny_config(model=FUSED), CPU).keys()
    assert not ops & choose_impls(tiny_config(), CPU).keys()


def test_deepspeed_communicates_all_linear_layers_alike() -> None:
    """It goes by the very class of a layer, and GeluLinear is one of its own."""
    from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES

    ds = parse_deepspeed(
        {
            "train_micro_batch_size_per_gpu": 4,
            "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        }
    )
    names = engine_config(ds, BatchSizes(4, 1, 1), CPU)["torch_autocast"]
    paths = [name.rpartition(".") for name in names["lower_precision_safe_modules"]]
    low = [getattr(import_module(package), name) for package, _, name in paths]
    assert set(LOWER_PRECISION_SAFE_MODULES) <= set(low)
    layers = [
        m for m in TrainModule(tiny_config(model=FUSED)).modules() if isinstance(m, nn.Linear)
    ]
    assert {type(layer) for layer in layers} <= set(low)
    assert len({type(layer) for layer in layers}) == 2
