"""What docs/performance.md, "Compilation", says: compiled blocks, AdamW, memory, shapes.

    pytest bench/bench_compilation.py --benchmark-only --full --benchmark-columns=median -s

ViT-S/16 at 224 pixels, batch 8, I-JEPA, fp32, on a CPU with one thread. ``eager`` and ``compile``
take turns within a test, as do the forms of AdamW; their ratio is printed. Times are CPU time.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.measure import peak_bytes
from njepa.config import Config, MaskConfig, parse_config
from njepa.data.batch import Batch, Masks
from njepa.draws.masks import MaskSampler
from njepa.training.compiling import compile_blocks
from njepa.training.ema import make_target
from njepa.training.engine import PlainEngine
from njepa.training.module import TrainModule, param_groups
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, training_step

SIZE = "vits16-224-b8"
BATCH, SIZES = 8, ((7, 5), (13, 13))  # of targets and context: the most frequent ones


pytestmark = pytest.mark.slow_on_cpu


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(**model: Any) -> Config:
    raw = {"method": "ijepa", "model": {"encoder": "vit_small", **model}}
    return parse_config(raw | {"mask": {"static_shapes": True}})


def make_batch(config: Config) -> Batch:
    masks = MaskSampler(config.mask, config.grid, 0, BATCH)
    step = next(step for step in range(1000) if masks.block_sizes(step) == SIZES)
    ids = np.arange(BATCH, dtype=np.int64)
    context, targets, _ = (torch.from_numpy(x) for x in masks(step, ids))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 224, 224, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, Masks(context, targets), None, torch.from_numpy(ids), step)


def in_turns(
    benchmark: Any, runs: dict[str, Callable[[], object]], rounds: int, **info: Any
) -> None:
    """Time every run once a round; the benchmark's own figure is a whole round."""
    times: dict[str, list[float]] = {name: [] for name in runs}

    def each() -> None:
        for name, run in runs.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)

    benchmark.pedantic(each, rounds=rounds, warmup_rounds=1)
    first, *others = (found[1:] for found in times.values())
    median = {name: statistics.median(found[1:]) for name, found in times.items()}
    ratios = [[a / b for a, b in zip(first, other, strict=True)] for other in others]
    speed = {
        name: [round(statistics.median(r), 3), round(min(r), 3), round(max(r), 3)]
        for name, r in zip(list(runs)[1:], ratios, strict=True)
    }
    benchmark.extra_info.update(info, impl="in-turns", clock="cpu", seconds=median, ratio=speed)
    print(f"\n{info}: seconds {median}; {next(iter(runs))} / x, median and range: {speed}")


def test_step(benchmark: Any) -> None:
    config = settings()
    batch, losses = make_batch(config), defaultdict[str, list[float]](list)

    def stepper(name: str) -> Callable[[], None]:
        module = TrainModule(config)
        target = make_target(module.jepa.encoder)
        if name == "compile":
            compile_blocks((module, target), static_shapes=True)
        state = TrainState(PlainEngine(module, config.optim, torch.device("cpu")), target)
        rates, found = Rates(1e-4, 0.04, 0.996), losses[name]

        def step() -> None:
            (seen,) = training_step(state, [batch], rates).micro_batches
            found.append(seen.metrics["loss"].item())

        return step

    tokens = [idx.shape[-1] for idx in batch.masks[:2]]
    runs = {name: stepper(name) for name in ("eager", "compile")}
    in_turns(benchmark, runs, 8, op="blocks", size=SIZE, tokens=tokens)
    np.testing.assert_allclose(losses["compile"], losses["eager"], rtol=2e-5)


def test_adamw(benchmark: Any) -> None:
    """The forms of torch's AdamW on the parameters of ViT-S/16."""
    forms: dict[str, dict[str, bool]] = {
        "default": {"fused": False, "foreach": False}, "foreach": {"foreach": True},
        "fused": {"fused": True},
    }  # fmt: skip
    weights: dict[str, list[torch.Tensor]] = {}

    def stepper(name: str) -> Callable[[], object]:
        module = TrainModule(settings()).jepa.encoder
        optimizer = torch.optim.AdamW(param_groups(module, 0.04), lr=1e-3, **forms[name])
        generator = torch.Generator().manual_seed(0)
        weights[name] = [p for p in module.parameters() if p.requires_grad]
        for p in weights[name]:
            p.grad = torch.randn(p.shape, generator=generator)
        return optimizer.step

    in_turns(benchmark, {name: stepper(name) for name in forms}, 20, op="adamw", size=SIZE)
    for name in ("foreach", "fused"):
        pairs = zip(weights[name], weights["default"], strict=True)
        worst = max((a - b).abs().max().item() for a, b in pairs)
        print(f"largest difference of a weight, {name}: {worst:.2g}")
        assert worst < 1e-7


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_memory(benchmark: Any, checkpoint_blocks: bool) -> None:
    config = settings(checkpoint_blocks=checkpoint_blocks)
    module, batch = TrainModule(config), make_batch(config)
    with torch.no_grad():
        h = make_target(module.jepa.encoder)(batch.images)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        module(batch, h)[0].backward()

    peak = peak_bytes(run, torch.device("cpu"))
    module.zero_grad(set_to_none=True)
    benchmark.pedantic(run, rounds=2)
    impl = "recomputed" if checkpoint_blocks else "kept"
    benchmark.extra_info.update(op="activations", size=SIZE, impl=impl, peak_bytes=peak)
    print(f"\ncheckpoint_blocks={checkpoint_blocks}: peak {peak / 2**20:.0f} MiB")


@pytest.mark.parametrize(
    ("side", "batch", "steps"), [(14, 128, 300), (14, 2048, 60), (16, 2048, 60)]
)
def test_shapes(benchmark: Any, side: int, batch: int, steps: int) -> None:
    """Pairs (Kc, Kt) that steps meet; timed is the choice of the fixed Kc, which is cached."""
    plain = MaskSampler(MaskConfig(), (side, side), 0)
    config = MaskConfig(static_shapes=True)
    static = benchmark.pedantic(lambda: MaskSampler(config, (side, side), 0, batch), rounds=1)
    found = []
    for masks in (plain, static):
        drawn = (masks(s, np.arange(s * batch, (s + 1) * batch)) for s in range(steps))
        shapes = [(m.context_idx.shape[1], m.target_idx.shape[2]) for m in drawn]
        found.append((len(set(shapes)), round(float(np.mean([k for k, _ in shapes])), 2)))
    benchmark.extra_info.update(
        op="shapes",
        size=f"{side}x{side}-b{batch}",
        impl="static",
        without=found[0],
        static=found[1],
    )
    print(f"\n{side}x{side}, batch {batch}: (shapes, mean Kc) {found[0]} without, {found[1]} with")
