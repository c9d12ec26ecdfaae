"""Time, memory and ceilings: how a number of the op benchmarks comes about.

    python -m bench.measure      # the ceilings of this machine, as JSON

Time. The implementations of a row take turns, round after round, each round beginning with the
next one, so that drift of the machine falls on all of them alike. A sample is the mean of as many
calls as fill a millisecond. On a GPU samples lie between two CUDA events; where the fastest of the
row takes less than 100 us a call, all of them are captured as CUDA graphs and launches are not what
is timed. Calls go through copies of the inputs until these are twice the last-level cache (at most
8 copies), so that inputs come from memory; outputs may be reused by the allocator, as in training.

Memory. The peak above the inputs, of one call, in a pass of its own: on a GPU from the caching
allocator's counters, on a CPU from every allocation and release that torch.profiler reports. What
C++ code allocates past torch's allocator (thread-local scratch) is not in it.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: One call of an implementation on the inputs with this number.
Call = Callable[[int], None]

GRAPH_BELOW = 100e-6
SAMPLE_SECONDS = 1e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 60
MAX_COPIES = 8
CPU_CACHE = 32 << 20  # assumed where none is reported; what one core can use of a shared cache


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample a round. ``method``: wall, events or graph."""

    samples: list[float]
    calls: int
    method: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run: bytes/s read plus written by a copy, FLOP/s."""

    bandwidth: float
    flops: float


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def input_copies(n_bytes: int, device: torch.device) -> int:
    """How many copies of inputs of this size are needed to leave the cache."""
    cache = CPU_CACHE
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_COPIES, -(-2 * cache // max(n_bytes, 1))))


def _wall(call: Call, calls: int) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        for i in range(calls):
            call(i)
        return (time.perf_counter() - start) / calls

    return sample


def _between_events(launch: Callable[[], None], calls: int) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda.synchronize()
        start.record()
        launch()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    return sample


def _events(call: Call, calls: int) -> Callable[[], float]:
    def launch() -> None:
        for i in range(calls):
            call(i)

    return _between_events(launch, calls)


def _graph(call: Call, calls: int) -> Callable[[], float]:
    """Raises RuntimeError where ``call`` cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    return _between_events(graph.replay, calls)


def interleaved(
    calls: Mapping[str, Call], device: torch.device, seconds: float
) -> dict[str, Timing]:
    """Times every call in turn for about ``seconds`` in all; each has been called before."""
    gpu = device.type == "cuda"
    single: dict[str, float] = {}
    for name, call in calls.items():
        call(0)
        call(1)
        probe = _events(call, 5) if gpu else _wall(call, 1)
        single[name] = min(probe() for _ in range(2))
    as_graphs = gpu and min(single.values()) < GRAPH_BELOW
    samplers: dict[str, tuple[Callable[[], float], int, str]] = {}
    for name, call in calls.items():
        n = max(1, min(200, round(SAMPLE_SECONDS / single[name])))
        if as_graphs:
            n = max(n, 10)
            try:
                samplers[name] = (_graph(call, n), n, "graph")
                continue
            except RuntimeError:  # not capturable: timed between events, and the row says so
                torch.cuda.synchronize()
        samplers[name] = (_events(call, n), n, "events") if gpu else (_wall(call, n), n, "wall")
    one_round = sum(single[name] * n for name, (_, n, _) in samplers.items())
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(one_round, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            start = i % len(order)
            for name in order[start:] + order[:start]:
                samples[name].append(samplers[name][0]())
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(samples[name], n, method) for name, (_, n, method) in samplers.items()}


class Replay:
    """A clock that stands still but for the samples it is given.

    All implementations of a row are timed in turn, before the first of their tests reports;
    pytest-benchmark then reads each one's samples from this clock.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, benchmark: Any, samples: list[float]) -> None:
        # Counted from 0 in every sample: no rounding from a sum over many of them.
        remaining = iter(samples)

        def reset() -> None:
            self.now = 0.0

        def play() -> None:
            self.now = next(remaining)

        benchmark.pedantic(play, setup=reset, rounds=len(samples))


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that one call held at a time above what was held before it.

    Results of the call count, also those that are dropped with it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Medians of a large copy and of a large matrix product, with random data."""
    gpu = device.type == "cuda"
    size, side, rounds = ((1 << 30), 8192, 20) if gpu else ((1 << 27), 1024, 9)
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def copy(_: int) -> None:
        target.copy_(source)

    def product(_: int) -> None:
        torch.mm(a, b, out=out)

    found = []
    for call in (copy, product):
        sample = _events(call, 3) if gpu else _wall(call, 1)
        sample()
        found.append(statistics.median(sample() for _ in range(rounds)))
    return Ceilings(2 * size / found[0], 2 * side**3 / found[1])


def main() -> int:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    found = {}
    for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.float32,):
        ceiling = ceilings(device, dtype)
        found[str(dtype).removeprefix("torch.")] = {
            "gbps": round(ceiling.bandwidth / 1e9, 1),
            "tflops": round(ceiling.flops / 1e12, 3),
        }
    sys.stdout.write(json.dumps({"device": device.type, **found}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
