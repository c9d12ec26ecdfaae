"""The predictor whose target blocks share one context, in one or in both predictions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from njepa_kernels import philox_normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.published.shared_context import dense_prediction
from njepa.config import Config
from njepa.data.batch import Batch, Masks
from njepa.models.predictor import Predictor, build_predictor
from tests.support.jobs import make_images, run_jobs
from tests.support.tiny import N_BLOCKS, N_CONTEXT, N_TARGETS, make_batch, tiny_config

BATCH, WIDTH, HEADS = 4, 24, 2


def config_of(context: str, method: str = "ijepa", depth: int = 2, **noise: Any) -> Config:
    part = {"width": WIDTH, "depth": depth, "heads": HEADS, "context": context}
    return tiny_config(method, model={"predictor": part}, noise=noise)


def build(config: Config) -> Predictor:
    """A predictor whose attention is far from uniform, or its part of the tests would be weak."""
    predictor = build_predictor(config, "predictor")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in predictor.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=g)
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    return predictor


def context_of(batch: int = BATCH) -> Tensor:
    return torch.randn(batch, N_CONTEXT, 32, generator=torch.Generator().manual_seed(2))


def arguments(batch: Batch) -> tuple[Any, ...]:
    """What the predictor gets after the context."""
    return (batch.masks,) if batch.noise is None else (batch.masks, batch.noise)


def first_input(predictor: Predictor, *args: Any, **options: Any) -> Tensor:
    seen: list[Tensor] = []
    block = predictor.predictor_blocks[0]
    hook = block.register_forward_pre_hook(lambda _, a: seen.append(a[0].detach()))
    predictor(*args, **options)
    hook.remove()
    return seen[0]


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# Values


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("predictions", ["clean", "noised", "both"])
def test_values_and_gradients_are_those_of_masked_attention(
    predictions: str, dtype: torch.dtype, tolerance: float
):
    config = config_of("shared", "ijepa" if predictions == "clean" else "njepa")
    predictor, batch = build(config).to(dtype), make_batch(config, step=3)
    z = context_of().to(dtype).requires_grad_()
    args = arguments(batch)
    prediction = predictor(z, *args, with_clean=predictions == "both")

    names = dict(predictor.named_parameters())
    exact = {name: p.detach().double().requires_grad_() for name, p in names.items()}
    exact_z = z.detach().double().requires_grad_()
    expected = dense_prediction(exact, HEADS, exact_z, *batch.masks[:2])
    if predictions != "clean":
        normal = philox_normal(batch.noise.key, batch.masks.target_idx, WIDTH)
        noise = batch.noise.sigma[..., None, None].double() * normal.double()
        noised = dense_prediction(exact, HEADS, exact_z, *batch.masks[:2], noise)
        assert relative(noised, expected) > 1e-2
        expected = noised if predictions == "noised" else torch.cat((expected, noised))
    assert relative(prediction, expected) < tolerance

    g = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (prediction * g.to(dtype)).sum().backward()
    (expected * g).sum().backward()
    assert relative(z.grad, exact_z.grad) < 2 * tolerance
    for name, parameter in names.items():
        if parameter.requires_grad:
            assert relative(parameter.grad, exact[name].grad) < 4 * tolerance, name


# What is the same as with a context for each block


def test_the_same_parameters_under_the_same_names():
    per_block, shared = (
        build_predictor(config_of(c), "predictor").state_dict() for c in ("per_block", "shared")
    )
    assert list(per_block) == list(shared)
    for name, tensor in per_block.items():
        assert torch.equal(tensor, shared[name]), name


@pytest.mark.parametrize("with_clean", [False, True], ids=["noised", "both"])
@pytest.mark.parametrize("space", ["predictor", "encoder_tied"])
@pytest.mark.parametrize("draw", ["per_block", "shared"])
def test_the_same_tokens_enter_the_first_block(draw: str, space: str, with_clean: bool):
    noise = {"draw": draw, "space": space}
    per_block, shared = (config_of(c, "njepa", **noise) for c in ("per_block", "shared"))
    args = (context_of(), *arguments(make_batch(shared)))
    tokens, rows = (
        first_input(build(config), *args, with_clean=with_clean) for config in (per_block, shared)
    )
    assert rows.shape == (BATCH * N_CONTEXT + len(tokens) * N_TARGETS, WIDTH)
    context, queries = rows.split((BATCH * N_CONTEXT, len(tokens) * N_TARGETS))
    torch.testing.assert_close(
        context.view(BATCH, N_CONTEXT, WIDTH), tokens[:BATCH, :N_CONTEXT], rtol=0, atol=0
    )
    torch.testing.assert_close(queries.view_as(tokens[:, N_CONTEXT:]), tokens[:, N_CONTEXT:])


@pytest.mark.parametrize("method", ["ijepa", "njepa"])
def test_one_layer_predicts_what_per_block_predicts(method: str):
    """In the first layer queries see context tokens that have seen no query, in both models."""
    got: dict[int, list[list[Tensor]]] = {1: [], 2: []}
    for depth, results in got.items():
        for context in ("per_block", "shared"):
            config = config_of(context, method, depth)
            predictor, z = build(config), context_of().requires_grad_()
            prediction = predictor(z, *arguments(make_batch(config)))
            weight = torch.linspace(-1, 1, prediction.numel()).view_as(prediction)
            (prediction * weight).sum().backward()
            trained = [p for p in predictor.parameters() if p.requires_grad]
            results.append([prediction.detach(), z.grad, *(p.grad for p in trained)])
    for per_block, shared in zip(*got[1], strict=True):
        assert (shared - per_block).norm() <= 2e-6 * per_block.norm()
    # From the second layer on it is another model.
    assert relative(got[2][1][0], got[2][0][0]) > 1e-3


# What follows from the mask


def test_a_block_knows_nothing_of_the_others():
    config = config_of("shared")
    predictor, batch, z = build(config), make_batch(config), context_of()
    rows = predictor(z, batch.masks)
    other_idx = batch.masks.target_idx.clone()
    other_idx[:, 1] = (other_idx[:, 1] + 7) % 36
    moved = predictor(z, Masks(batch.masks.context_idx, other_idx))
    before, after = (x.unflatten(0, (N_BLOCKS, BATCH)) for x in (rows, moved))
    rest = [m for m in range(N_BLOCKS) if m != 1]
    assert torch.equal(after[rest], before[rest])
    assert relative(after[1], before[1]) > 1e-2
    for m in range(N_BLOCKS):  # alone, and the batch's order does not matter either
        flipped = (idx.flip(0) for idx in (batch.masks.context_idx, batch.masks.target_idx[:, [m]]))
        alone = predictor(z.flip(0), Masks(*flipped))
        torch.testing.assert_close(alone.flip(0), before[m], rtol=1e-5, atol=1e-5)


def test_blocks_in_another_order_give_predictions_in_that_order():
    config, order = config_of("shared"), [2, 0, 3, 1]
    predictor, batch, z = build(config), make_batch(config), context_of()
    rows = predictor(z, batch.masks).unflatten(0, (N_BLOCKS, BATCH))
    permuted = predictor(z, Masks(batch.masks.context_idx, batch.masks.target_idx[:, order]))
    torch.testing.assert_close(
        permuted.unflatten(0, (N_BLOCKS, BATCH)), rows[order], rtol=1e-5, atol=1e-5
    )


def test_both_predictions_without_noise_are_the_clean_one():
    config = config_of("shared", "njepa")
    predictor, batch, z = build(config), make_batch(config, sigmas=(0.0,)), context_of()
    expected = predictor(z, batch.masks)
    clean, noised = predictor(z, *arguments(batch), with_clean=True).chunk(2)
    assert torch.equal(noised, clean)
    torch.testing.assert_close(clean, expected, rtol=1e-5, atol=1e-5)


# Cost, compilation, precision


def forward_flops(config: Config, n_blocks: int) -> int:
    predictor, batch = build(config), make_batch(config)
    target_idx = batch.masks.target_idx.repeat(1, n_blocks // N_BLOCKS, 1)
    counter = FlopCounterMode(display=False)
    # The counter knows no formula for the CPU's fused attention, but that of its products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        predictor(context_of(), Masks(batch.masks.context_idx, target_idx))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("n_blocks", [N_BLOCKS, 2 * N_BLOCKS], ids=["one", "both"])
def test_operations_are_those_of_the_formula(n_blocks: int):
    d, encoder_width = WIDTH, 32
    n_queries, length = n_blocks * N_TARGETS, N_CONTEXT + N_TARGETS
    ends = 2 * d * encoder_width * (N_CONTEXT + n_queries)
    # Per token 12 d^2 multiplications (qkv 3, projection 1, MLP 8), per pair 2 d.
    shared = 24 * d * d * (N_CONTEXT + n_queries) + 4 * d * (N_CONTEXT**2 + n_queries * length)
    per_block = n_blocks * (24 * d * d * length + 4 * d * length**2)
    # In the last layer context tokens have keys and values (and queries that do not ask) only.
    asked = 4 * d * n_queries * length
    shared_last = 6 * d * d * (N_CONTEXT + n_queries) + 18 * d * d * n_queries + asked
    per_block_last = 6 * d * d * n_blocks * length + 18 * d * d * n_queries + asked
    for depth in (1, 2, 3):
        for context, layer, last in (
            ("shared", shared, shared_last),
            ("per_block", per_block, per_block_last),
        ):
            expected = BATCH * (ends + (depth - 1) * layer + last)
            assert forward_flops(config_of(context, depth=depth), n_blocks) == expected


@pytest.mark.slow
def test_compiles_as_one_graph():
    config = config_of("shared", "njepa")
    predictor, batch, z = build(config), make_batch(config), context_of().requires_grad_()
    parameters = [z, *(p for p in predictor.parameters() if p.requires_grad)]
    results = []
    torch._dynamo.reset()
    for forward in (predictor, torch.compile(predictor, fullgraph=True)):
        prediction = forward(z, *arguments(batch), with_clean=True)
        loss = prediction.square().mean()
        results.append([prediction, *torch.autograd.grad(loss, parameters)])
    for eager, compiled in zip(*results, strict=True):
        assert relative(compiled, eager) < 1e-5


def test_under_autocast_the_residual_stream_stays_fp32():
    config = config_of("shared", "njepa")
    predictor, args = build(config), arguments(make_batch(config))
    exact = predictor(context_of(), *args)
    streams: list[torch.dtype] = []
    for block in predictor.predictor_blocks:
        block.register_forward_hook(lambda _, a, out: streams.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = predictor(context_of().bfloat16(), *args)
    assert streams == [torch.float32] * 2
    assert 1e-4 < relative(prediction, exact) < 3e-2


# training

STEPS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("shared")
    make_images(root / "images", 16)

    def job(name: str, world: int, stage: int, extra: list[str], folder: str) -> dict[str, Any]:
        return {
            "name": name,
            "overrides": [
                "method=njepa", "noise.predictors=shared",
                "model.predictor={depth: 2, width: 16, heads: 2, context: shared}",
                f"data.path={root}/images", f"data.cache_dir={root}/cache{world}",
                f"run.dir={root}/{folder}", f"run.max_steps={STEPS}", *extra,
            ],
            "ds": {
                "train_micro_batch_size_per_gpu": 8 // world,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        }  # fmt: skip

    one = run_jobs(
        [
            job("whole", 1, 0, [], "whole"),
            job("first", 1, 0, ["run.stop_after=4"], "cut"),
            job("second", 1, 0, ["run.resume=true"], "cut"),
        ],
        1,
        root / "one",
    )
    stop = ["run.stop_after=3"]
    two = run_jobs([job(f"zero{s}", 2, s, stop, f"zero{s}") for s in (1, 3)], 2, root / "two")
    return root, one, two


@pytest.mark.slow
@pytest.mark.multirank
def test_the_loss_falls_and_a_resumed_run_goes_on_as_if_not_stopped(trained: Any):
    root, one, _ = trained
    losses = one["whole"]["losses"]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert one["first"]["losses"] + one["second"]["losses"] == losses
    for name, tensor in one["whole"]["target"].items():
        assert torch.equal(one["second"]["target"][name], tensor), name
    log = (root / "one" / "rank0.log").read_text()
    assert "predictor  2 blocks of width 16, context shared" in log
    assert json.loads((root / "whole" / "summary.json").read_text())["steps"] == STEPS


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_train_as_one(trained: Any, stage: int):
    _, one, two = trained
    assert two[f"zero{stage}"]["losses"] == pytest.approx(one["whole"]["losses"][:3], rel=2e-5)
