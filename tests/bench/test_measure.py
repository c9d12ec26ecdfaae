"""The helpers of the op benchmarks: time in turns, peak memory, checks before times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from njepa_kernels.ops.ema_update_.cases import vit_shapes
from njepa_kernels.testing import VITS, all_cases
from timm.models.vision_transformer import VisionTransformer

from bench import bench_ops
from bench.bench_ops import Result, Unit, measure, modes, units
from bench.measure import (
    CYCLES_PER_SECOND,
    Queued,
    ceilings,
    copy_call,
    input_copies,
    interleaved,
    peak_bytes,
)

CPU = torch.device("cpu")
SMALL = {case.name: case for case in all_cases(small=True)}


def test_calls_take_turns_and_slow_ones_are_slow() -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float) -> Callable[[int], None]:
        def call(_: int) -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    found = interleaved({"a": sleeper("a", 0.004), "b": sleeper("b", 0.012)}, CPU, 0.1)
    assert found["a"].clock == "wall"
    assert len(found["a"].samples) == len(found["b"].samples) >= 5
    assert found["a"].median >= 0.004
    assert found["b"].median / found["a"].median > 1.5
    # After the probes (4 calls each) every round has both, and the first one changes.
    rounds = [tuple(order[i : i + 2]) for i in range(8, len(order), 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}


class SimulatedGpu:
    """A host, a GPU and a queue of ``depth``, in simulated seconds; stands in for torch.cuda."""

    def __init__(self, depth: int = 1000) -> None:
        self.host = self.free = 0.0
        self.depth, self.pending = depth, list[float]()

    def launch(self, host: float, seconds: float) -> None:
        self.host += host
        self.pending = [end for end in self.pending if end > self.host]
        if len(self.pending) >= self.depth:
            self.host = self.pending.pop(0)
        self.free = max(self.free, self.host) + seconds
        self.pending.append(self.free)

    def _sleep(self, cycles: int) -> None:
        self.launch(1e-6, cycles / CYCLES_PER_SECOND)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def Event(self, enable_timing: bool) -> SimulatedEvent:
        return SimulatedEvent(self)


class SimulatedEvent:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.gpu.launch(1e-6, 0.0)
        self.at = self.gpu.free

    def query(self) -> bool:
        return self.gpu.host >= self.at

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize(
    ("host", "gpu", "waits", "depth", "expected", "clock"),
    [
        (50e-6, 10e-6, False, 1000, 10e-6, "queued"),
        (50e-6, 400e-6, False, 1000, 400e-6, "queued"),
        (50e-6, 10e-6, False, 30, 10e-6, "queued"),  # a short queue: fewer calls
        (50e-6, 10e-6, True, 1000, 60e-6, "events"),  # waits for the GPU: the host is in it
    ],
    ids=["host-bound", "gpu-bound", "short queue", "waits"],
)
def test_a_gpus_time_is_without_the_host_or_says_so(
    monkeypatch: pytest.MonkeyPatch,
    host: float,
    gpu: float,
    waits: bool,
    depth: int,
    expected: float,
    clock: str,
) -> None:
    simulated = SimulatedGpu(depth)
    monkeypatch.setattr("bench.measure.torch.cuda", simulated)
    monkeypatch.setattr("bench.measure.time.perf_counter", lambda: simulated.host)

    def call(_: int) -> None:
        simulated.launch(host, gpu)
        if waits:
            simulated.synchronize()

    sampler = Queued(call, 100)
    samples = [sampler() for _ in range(3)]
    assert sampler.clock == clock
    assert samples == pytest.approx([expected] * 3, rel=0.02)
    if not waits:
        assert sampler.host == pytest.approx(host, rel=1e-6)


def test_a_copy_moves_the_bytes_it_is_named_for() -> None:
    copy = copy_call(1 << 20, CPU)
    with torch.profiler.profile(record_shapes=True) as profile:
        copy(0)
    (copied,) = (e for e in profile.events() if e.name == "aten::copy_" and e.input_shapes[0])
    assert copied.input_shapes[:2] == [[1 << 19]] * 2  # int8, once read and once written


def test_eager_patchify_takes_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host waits for the GPU; the constants are made in the first call."""
    case = SMALL["patchify-b2-6x6-p8"]
    inputs = case.make_inputs(CPU, torch.float32, 0)
    first = case.eager(**inputs)
    monkeypatch.delattr(torch, "tensor")
    assert torch.equal(case.eager(**inputs), first)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.empty(1 << 20), 4 << 20),
        (lambda: [torch.empty(1 << 20), torch.empty(1 << 20)], 8 << 20),
        (lambda: torch.empty(1 << 20) is torch.empty(1 << 19), 6 << 20),
        (lambda: [torch.empty(1 << 20).numel() for _ in range(3)], 4 << 20),
        (lambda: None, 0),
    ],
    ids=["one", "held", "two sizes", "one after the other", "none"],
)
def test_peak_is_what_is_held_at_once(call: Callable[[], Any], expected: int) -> None:
    assert peak_bytes(call, CPU) == expected


def test_peak_counts_what_the_backward_holds() -> None:
    x = torch.randn(1 << 18, requires_grad=True)

    def step() -> None:
        torch.autograd.grad(x.exp().sum(), x)  # exp is kept for the gradient

    assert 2 << 20 <= peak_bytes(step, CPU) <= (3 << 20) + 4096


def test_copies_of_the_inputs_leave_the_cache() -> None:
    assert input_copies(1 << 30, CPU) == 1
    assert input_copies(32 << 20, CPU) == 2
    assert input_copies(1000, CPU) == input_copies(0, CPU) == 8


def test_ceilings_are_of_this_machine() -> None:
    found = ceilings(CPU, torch.float32)
    assert 1e8 < found.bandwidth < 1e14
    assert 1e8 < found.flops < 1e16


class Options:
    ops = sizes = dtypes = None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_every_vit(device: str) -> None:
    batch = {"cpu": 8, "cuda": 128}[device]
    found = {(u.case.op, u.case.size) for u in units(torch.device(device), Options())}
    for op in {op for op, _ in found} - {"ema_update_", "adamw_ema_", "patchify"}:
        for vit in VITS:
            assert (op, f"{vit}-224-b{batch}") in found
    assert {size for op, size in found if op == "ema_update_"} == (
        set(VITS) if device == "cuda" else {"vits16", "vitb16"}
    )
    assert not [size for _, size in found if size.endswith("-b8" if batch == 128 else "-b128")]


@pytest.mark.parametrize("vit", VITS)
def test_ema_has_the_parameters_of_the_vit(vit: str) -> None:
    size = VITS[vit]
    with torch.device("meta"):
        model = VisionTransformer(
            patch_size=size.patch,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=16,
            class_token=False,
            num_classes=0,
            global_pool="avg",
            fc_norm=False,
        )
    parameters = dict(model.named_parameters())
    assert parameters.pop("pos_embed").shape == (1, size.patches, size.width)
    assert vit_shapes(size) == [tuple(p.shape) for p in parameters.values()]
    case = next(c for c in all_cases("ema_update_", small=False) if c.size == vit)
    count = sum(p.numel() for p in parameters.values())
    assert case.bytes(torch.bfloat16, "fwd") == (4 + 4 + 2 + 2) * count


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "ROW_SECONDS", {"cpu": 0.01})
    real = bench_ops.implementations
    monkeypatch.setattr(
        bench_ops,
        "implementations",
        lambda case, device: {k: v for k, v in real(case, device).items() if k != "compile"},
    )


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    "name", ["jepa_loss-b3-m4-kt6-n36-d64", "ema_update_-five-shadow", "vicreg-m2-n33-d33"]
)
def test_a_row_is_consistent(name: str) -> None:
    case = SMALL[name]
    outcomes = measure(Unit(case, torch.float32), CPU)
    for mode in modes(case):
        eager = outcomes["eager", mode]
        assert isinstance(eager, Result)
        assert eager.extra["ratio_eager"] == 1.0
        ours = outcomes["reference", mode]
        assert isinstance(ours, Result)
        extra, median = ours.extra, ours.timing.median
        assert extra["ratio_eager"] == eager.timing.median / median
        assert extra["ratio_compile"] is None
        assert extra["bytes"] == case.bytes(torch.float32, mode)
        assert extra["gbps"] == pytest.approx(extra["bytes"] / median / 1e9)
        product = extra["flops"] / extra["ceiling_tflops"] / 1e12
        assert extra["bound_seconds"] >= product * (1 - 1e-9)
        assert (extra["bound"] == "matmul") == (
            extra["bound_seconds"] == pytest.approx(product, rel=1e-9)
        )
        assert extra["fraction"] == extra["bound_seconds"] / median
        assert extra["clock"] == "wall"
        assert ours.peak >= 0


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_a_wrong_result_has_no_number(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL["gather_tokens-b3-n49-k12-d64"]
    real = bench_ops.implementations

    def wrong(**inputs: Any) -> torch.Tensor:
        return case.reference(**inputs) * 1.001

    monkeypatch.setattr(bench_ops, "implementations", lambda c, d: real(c, d) | {impl: wrong})
    if impl == "eager":
        case = replace(case, eager=wrong)
    outcomes = measure(Unit(case, torch.float32), CPU)
    for mode in modes(case):
        assert isinstance(outcomes[impl, mode], AssertionError)
        assert isinstance(outcomes["reference" if impl == "eager" else "eager", mode], Result)
