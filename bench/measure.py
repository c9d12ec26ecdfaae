"""Time, memory and ceilings: how a number of the op benchmarks comes about.

    python -m bench.measure      # the ceilings of this machine, as JSON

Time. The implementations of a row take turns, round after round, each round beginning with the
next one, so that drift of the machine falls on all of them alike. A sample is the mean of as many
calls as fill a millisecond. Calls go through copies of the inputs until these are twice the
last-level cache (at most 8 copies), so that inputs come from memory; outputs may be reused by the
allocator, as in training.

Clocks. Every row says which it has. ``queued``: between two CUDA events, behind work that kept the
GPU busy until all calls were in its queue, so it is the time of the GPU alone; that the first event
had not yet passed when the last call was queued is checked for every sample. ``events``: the same,
but the queue ran dry (a call that waits for the GPU does that), so the host's time is in it.
``wall``: the host's clock. Nothing is captured as a graph: a capture that fails spoils its process.

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

SAMPLE_SECONDS = 1e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 60
MAX_COPIES = 8
#: No GPU clocks higher: waiting for so many cycles takes at least the time meant.
CYCLES_PER_SECOND = 2.5e9
CPU_CACHE = 32 << 20  # assumed where none is reported; what one core can use of a shared cache


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample a round. ``clock``: wall, queued or events."""

    samples: list[float]
    calls: int
    clock: str
    host: float | None = None
    """Seconds that one call took the host, where the GPU has a clock of its own."""

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


class Wall:
    """Samples of ``calls`` calls on the host's clock."""

    clock = "wall"
    host: float | None = None

    def __init__(self, call: Call, calls: int) -> None:
        self.call, self.calls = call, calls

    def __call__(self) -> float:
        start = time.perf_counter()
        for i in range(self.calls):
            self.call(i)
        return (time.perf_counter() - start) / self.calls


class Queued:
    """Samples of ``calls`` calls on the GPU's clock, behind work that lets the host run ahead."""

    def __init__(self, call: Call, calls: int) -> None:
        self.call, self.calls, self.clock = call, calls, "queued"
        self.host: float | None = None
        self._head_start = 0.0  # seconds; unknown before the first sample
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        seconds, host, ahead = self._sample()
        calls = self.calls
        for attempt in range(6):
            if ahead or self.clock == "events":
                break
            if attempt:  # a full queue makes the host wait: then fewer calls help, and not time
                self.calls = max(1, self.calls // 2)
            self._head_start = 1.5 * self.calls * host + 50e-6
            seconds, host, ahead = self._sample()
        if not ahead and self.clock == "queued":
            self.calls, self.clock = calls, "events"
            seconds, host, _ = self._sample()
        self.host = host
        return seconds

    def _sample(self) -> tuple[float, float, bool]:
        """GPU and host seconds per call, and whether the host was done before the GPU began."""
        torch.cuda.synchronize()
        if self._head_start and self.clock == "queued":
            torch.cuda._sleep(int(self._head_start * CYCLES_PER_SECOND))
        self._start.record()
        began = time.perf_counter()
        for i in range(self.calls):
            self.call(i)
        host = (time.perf_counter() - began) / self.calls
        self._end.record()
        ahead = not self._start.query()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3 / self.calls, host, ahead


def copy_call(n_bytes: int, device: torch.device) -> Call:
    """A copy that reads and writes ``n_bytes`` in all: what an op with this traffic can reach."""
    half = max(n_bytes // 2, 1)
    source = torch.randint(0, 127, (half,), dtype=torch.int8, device=device)
    copies = [(source, torch.empty_like(source))]
    copies += [
        (source.clone(), torch.empty_like(source)) for _ in range(input_copies(half, device) - 1)
    ]

    def copy(i: int) -> None:
        source, target = copies[i % len(copies)]
        target.copy_(source)

    return copy


def interleaved(
    calls: Mapping[str, Call], device: torch.device, seconds: float
) -> dict[str, Timing]:
    """Times every call in turn for about ``seconds`` in all; each has been called before."""
    clock = Queued if device.type == "cuda" else Wall
    samplers: dict[str, Queued | Wall] = {}
    one_round = 0.0
    for name, call in calls.items():
        call(0)
        call(1)
        probe = clock(call, 5 if clock is Queued else 1)
        single = max(min(probe() for _ in range(2)), 1e-9)
        n = max(1, min(200, round(SAMPLE_SECONDS / single)))
        samplers[name] = clock(call, n)
        one_round += single * n
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round)))
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            start = i % len(order)
            for name in order[start:] + order[:start]:
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return {n: Timing(samples[n], s.calls, s.clock, s.host) for n, s in samplers.items()}


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
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product(_: int) -> None:
        torch.mm(a, b, out=out)

    found = []
    for call in (copy_call(2 * size, device), product):
        sample = Queued(call, 3) if gpu else Wall(call, 1)
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
