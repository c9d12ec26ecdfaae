"""The whole training step: njepa against the published composition, eager and compiled.

    python -m pytest bench/bench_step.py --benchmark-only

Environment: NJEPA_BENCH_STEP_SIZES (``vitb16-224-b128,vith14-224-bmax``; "bmax" is the largest
power of two that every variant can hold), NJEPA_BENCH_STEP_ROUNDS, NJEPA_BENCH_STEP_VARIANTS
(``eager,compile,auto``). Without them a CPU times ViT-S/16 with 8 images and what is not
compiled, a GPU S/16 to L/16 with 128 and everything.

Variants run in interleaved rounds of one process (``bench.step_race``), because a machine's speed
drifts by more than variants differ. pytest-benchmark then gets the seconds that were measured.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

MISSING = [
    name for name in ("numpy", "yaml", "pydantic", "timm") if not importlib.util.find_spec(name)
]
if MISSING:
    pytest.skip(f"the trainer needs {', '.join(MISSING)}", allow_module_level=True)

from bench.measure import Replay  # noqa: E402
from bench.step_race import Race  # noqa: E402
from bench.step_sizes import usual_variants  # noqa: E402
from njepa.choice import Choice  # noqa: E402
from njepa.config import load_config  # noqa: E402
from njepa.data.loader import Loader  # noqa: E402
from njepa.data.pixels import Pixels  # noqa: E402
from njepa.draws.masks import MaskSampler  # noqa: E402
from njepa.draws.order import SampleOrder  # noqa: E402
from njepa.training.precision import matrix_units  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SIZES = os.environ.get("NJEPA_BENCH_STEP_SIZES") or (
    "vits16-224-b128,vitb16-224-b128,vitl16-224-b128" if ON_GPU else "vits16-224-b8"
)
NAMED = [n for n in os.environ.get("NJEPA_BENCH_STEP_VARIANTS", "").split(",") if n]
VARIANTS = NAMED or usual_variants(DEVICE.type, matrix_units() is not None)
ROUNDS = int(os.environ.get("NJEPA_BENCH_STEP_ROUNDS", "12" if ON_GPU else "3"))
WARMUP, PHASE_STEPS = (3, 5) if ON_GPU else (1, 1)  # the first: for each shape


@pytest.fixture(scope="module")
def races() -> Iterator[dict[str, Race]]:
    """The race of a size, run when its first variant asks; only one is kept in memory."""
    found: dict[str, Race] = {}
    yield found
    found.clear()


CLOCK = Replay()


@pytest.mark.parametrize("impl", VARIANTS)
@pytest.mark.parametrize("size", SIZES.split(","))
@pytest.mark.benchmark(timer=CLOCK, warmup=False, disable_gc=True)
def test_step(benchmark: Any, races: dict[str, Race], size: str, impl: str) -> None:
    """``eager``, ``compile``: as published. ``reference``, ``auto``: ours by ``impl.default``.

    ``shared``: ours with ``model.predictor.context=shared``, another model. ``blocks``: ours with
    ``run.compile=blocks``; ``static+blocks``: with ``mask.static_shapes``, too, and then the masks
    of all variants have static shapes. ``fused``: ours with ``model.fused_block``. ``...-bf16``: on
    a CPU under bf16 autocast; the others are in fp32 there.
    """
    if size not in races:
        races.clear()
        torch._dynamo.reset()
        races[size] = Race(size, DEVICE, ROUNDS, WARMUP, PHASE_STEPS, VARIANTS)
    race = races[size]
    CLOCK.run(benchmark, race.runners[impl].seconds)
    benchmark.extra_info.update(race.row(impl))


class ReadyPixels:
    """A pixel source that never lets one wait; its images have one pixel."""

    def __init__(self, order: SampleOrder) -> None:
        self.images = torch.zeros(order.micro_batch, 3, 1, 1, dtype=torch.uint8)
        self.order, self.step = order, -1

    def __next__(self) -> Pixels:
        self.step += 1
        return Pixels(self.images, self.order.at(self.step).ids, [])

    def close(self) -> None:
        pass


def ready_loader(method: str, batch: int, steps: int) -> Loader:
    """The trainer's loader on one rank of ImageNet's size, on the CPU."""
    config = load_config("in1k-vitb16", ["data.path=.", f"method={method}"])
    seed = config.run.seed
    order = SampleOrder(1_281_167, batch, 1, 1, 0, seed)
    masks = MaskSampler(config.mask, config.grid, seed)
    order.at(0)  # the permutation of an epoch is drawn once
    index: Any = None  # asked for the names of unreadable images alone
    return Loader(
        config, index, order, masks, torch.device("cpu"), range(steps), ReadyPixels(order),
        Choice("ready", "no pixels"),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["ijepa", "njepa"])
def test_host_work(benchmark: Any, method: str) -> None:
    """Everything of a batch of 128 but its pixels: order, masks, sigmas, tensors, hand-over.

    The loader's own thread does it while the step runs; one round drains 200 batches of a loader
    whose pixels are always ready.
    """
    batches, batch = 200, 128
    loader = ready_loader(method, batch, 4 * batches)
    stream = iter(loader)

    cpu = []

    def drain() -> None:
        start = time.process_time()
        for _ in range(batches):
            next(stream)
        cpu.append(1e3 * (time.process_time() - start) / batches)

    try:
        first = next(stream)
        assert [len(idx) for idx in first.masks[:2]] == [batch] * 2
        assert (first.noise is not None) == (method == "njepa")
        benchmark.pedantic(drain, rounds=3, warmup_rounds=0)
    finally:
        loader.close()
    median = benchmark.stats.stats.median if benchmark.stats else float("nan")
    benchmark.extra_info.update(
        op="host_work",
        size=f"14x14-b{batch}",
        impl=method,
        mode="fwd",
        ms_per_batch=1e3 * median / batches,
        cpu_ms_per_batch=sorted(cpu)[len(cpu) // 2],  # of both threads; other processes left out
        threads=torch.get_num_threads(),
    )
