"""Every op at the sizes of ViT-S/16, B/16, L/16 and H/14, against eager and torch.compile.

    python -m pytest bench/bench_ops.py --benchmark-only [--ops vicreg] [--sizes vits16 vith14]

Sizes, inputs, opponents, bytes and FLOPs come from ``njepa_kernels.testing.all_cases``: batch 8 and
fp32 on a CPU, batch 128, bf16 and fp32 on a GPU. ``eager`` is the composition of the published
code, ``compile`` is torch.compile of it (static shapes; compiled before the timing), the others are
the op's own implementations. ``fwd`` runs without autograd, ``fwdbwd`` with the gradients of all
differentiable inputs. How time and memory are measured: ``bench/measure.py``.

Values and gradients are checked before anything is timed. A wrong result fails the benchmark.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from njepa_kernels._runtime.dispatch import IMPLEMENTATIONS, choose
from njepa_kernels.testing import (
    Inputs,
    Mode,
    OpCase,
    all_cases,
    assert_within_baseline,
    cast_inputs,
    copy_inputs,
    evaluate,
    stack_values,
)

from bench.facts import machine
from bench.measure import (
    Call,
    Replay,
    Timing,
    ceilings,
    copy_call,
    input_copies,
    interleaved,
    peak_bytes,
)

COMPOSITIONS = ("eager", "compile", "reference")
#: Ops whose result is a number or three: checked on four draws, as one says little about rounding.
SCALAR_RESULT = {"jepa_loss", "vicreg"}
#: Time for one row, all implementations together.
ROW_SECONDS = {"cpu": 0.7, "cuda": 0.5}
OP_SECONDS = {"cpu": 160.0, "cuda": 420.0}
#: The order of sizes: if time runs out, what is left out is what says least.
_ORDER = ["vitl16", "vith14", "vits16", "vitb16"]


@dataclass(frozen=True)
class Unit:
    """What is set up, checked and compiled once."""

    case: OpCase
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Result:
    """One implementation in one mode."""

    timing: Timing
    peak: int
    extra: dict[str, Any]


#: Result, or why there is none: a message to skip with or the exception of a failed check.
Outcome = Result | str | Exception


def the_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def units(device: torch.device, options: Any) -> list[Unit]:
    """What runs on ``device``, of what the options ask for."""
    names = options.dtypes or (["bfloat16", "float32"] if device.type == "cuda" else ["float32"])
    cases = [
        case
        for case in all_cases(small=False)
        if device.type in case.devices
        and (not options.ops or case.op in options.ops)
        and (not options.sizes or any(text in case.size for text in options.sizes))
    ]
    cases.sort(key=lambda c: next((i for i, n in enumerate(_ORDER) if n in c.size), -1))
    return [Unit(case, getattr(torch, name)) for case in cases for name in names]


def modes(case: OpCase) -> tuple[Mode, ...]:
    return ("fwd", "fwdbwd") if case.differentiable else ("fwd",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = the_device()
    impls = ["eager", "compile", "reference", "native"]
    if device.type == "cuda":
        impls.insert(3, "triton")
    rows = [
        pytest.param(u, impl, mode, id=f"{u.case.name}-{u.dtype_name}-{mode}-{impl}")
        for u in units(device, metafunc.config.option)
        for mode in modes(u.case)
        for impl in impls
    ]
    metafunc.parametrize(("unit", "impl", "mode"), rows)


def implementations(case: OpCase, device: torch.device) -> dict[str, Callable[..., Any] | str]:
    """Name -> function, or why it cannot run here."""
    found: dict[str, Callable[..., Any] | str] = {"eager": case.eager}
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++"))):
        found["compile"] = "torch.compile on a CPU needs a C++ compiler, and there is none"
    else:
        found["compile"] = torch.compile(case.eager, dynamic=False)
    for name in IMPLEMENTATIONS:

        def function(_name: str = name, **inputs: Any) -> Any:
            return case.function(impl=_name, **inputs)

        try:
            choose(case.op, name, device)
            found[name] = function
        except RuntimeError as reason:
            found[name] = str(reason)
    return found


def check(unit: Unit, values: dict[str, torch.Tensor], base: Any, exact: Any, impl: str) -> None:
    """Values and gradients against the fp64 reference, eager's own error being the measure.

    That is the promise of the fused implementations. The compositions (eager, compile, and the
    reference in this type) are held to 32 roundings of the largest value.
    """
    assert values.keys() == exact.keys(), f"{impl}: {sorted(values)} instead of {sorted(exact)}"
    for name, value in values.items():
        what = f"{unit.case.name} {unit.dtype_name} {impl}: {name}"
        if impl not in COMPOSITIONS:
            assert_within_baseline(value, base[name], exact[name], unit.dtype, what)
        elif value.numel():
            error = float((value.double() - exact[name]).abs().max())
            rounding = max(torch.finfo(d).eps for d in (unit.dtype, value.dtype))
            bound = 32 * rounding * float(exact[name].abs().max())
            assert error <= bound, f"{what}: error {error:.3e} > {bound:.3e}"


def _bytes(inputs: Inputs) -> int:
    values = [i for v in inputs.values() for i in (v if isinstance(v, list) else [v])]
    return sum(v.nbytes for v in values if isinstance(v, torch.Tensor))


def make_call(unit: Unit, function: Callable[..., Any], sets: list[Inputs], mode: Mode) -> Call:
    """A call of the op, with its gradients in ``fwdbwd``. Cotangents are fixed and random."""
    case = unit.case
    if mode == "fwd":

        def forward(i: int) -> None:
            with torch.no_grad():
                function(**sets[i % len(sets)])

        return forward
    names = [name for name in case.differentiable if sets[0].get(name) is not None]
    cotangents: list[torch.Tensor] = []

    def both(i: int) -> None:
        inputs = sets[i % len(sets)]
        outputs = case.outputs(function(**inputs), inputs).values()
        roots = [tensor for tensor in outputs if tensor.requires_grad]
        if not cotangents:
            cotangents.extend(torch.randn_like(r) if r.dim() else torch.ones_like(r) for r in roots)
        torch.autograd.grad(roots, [inputs[name] for name in names], cotangents)

    return both


_started: float | None = None
_last: tuple[Unit, dict[tuple[str, str], Outcome]] | None = None
_ceilings = cache(ceilings)


def measured(unit: Unit, limit: float) -> dict[tuple[str, str], Outcome]:
    """All implementations and modes of one unit. Only the last one is kept."""
    global _started, _last
    if _last is not None and _last[0] == unit:
        return _last[1]
    now = time.monotonic()
    _started = now if _started is None else _started
    _last = None
    if now - _started > limit:
        pytest.skip(f"the {limit:.0f} s of --op-seconds are used up")
    _last = (unit, measure(unit, the_device()))
    return _last[1]


def measure(unit: Unit, device: torch.device) -> dict[tuple[str, str], Outcome]:
    """Checks every implementation, then times in turn those that are right."""
    case = unit.case
    torch._dynamo.reset()  # else a second size would be compiled for dynamic shapes
    ceiling = _ceilings(device, unit.dtype)
    inputs = case.make_inputs(device, unit.dtype, 0)
    drawn = [inputs]
    if case.op in SCALAR_RESULT:
        drawn += [case.make_inputs(device, unit.dtype, seed) for seed in (1, 2, 3)]

    def results(function: Callable[..., Any], dtype: torch.dtype | None = None) -> Any:
        given = drawn if dtype is None else [cast_inputs(one, dtype) for one in drawn]
        return stack_values([evaluate(case, function, one) for one in given])

    exact, base = results(case.reference, torch.float64), results(case.eager)
    outcomes: dict[tuple[str, str], Outcome] = {}
    right: dict[str, Callable[..., Any]] = {}
    compile_seconds = 0.0
    for impl, function in implementations(case, device).items():
        failed: str | Exception | None = function if isinstance(function, str) else None
        if not isinstance(function, str):
            start = time.perf_counter()
            try:
                values = base if impl == "eager" else results(function)
                check(unit, values, base, exact, impl)
                right[impl] = function
            except Exception as fault:  # kept for the test of this implementation, which raises it
                failed = fault
            if impl == "compile":
                compile_seconds = time.perf_counter() - start
        if failed is not None:
            outcomes |= {(impl, mode): failed for mode in modes(case)}
    del exact, base
    drawn.clear()

    sets = [inputs]
    sets += [copy_inputs(inputs) for _ in range(input_copies(_bytes(inputs), device) - 1)]
    for one in sets:
        for name in case.differentiable:
            if one.get(name) is not None:
                one[name].requires_grad_()
    for mode in modes(case):
        calls = {impl: make_call(unit, f, sets, mode) for impl, f in right.items()}
        for call in calls.values():
            call(0)  # compiles what this mode needs, and makes the cotangents
        peaks = {impl: peak_bytes(lambda c=call: c(0), device) for impl, call in calls.items()}
        n_bytes, flops = case.bytes(unit.dtype, mode), case.flops(mode)
        calls["copy"] = copy_call(n_bytes, device)  # in turn with the others
        timings = interleaved(calls, device, ROW_SECONDS[device.type])
        copy_seconds = timings.pop("copy").median
        product_seconds = flops / ceiling.flops
        bound = max(copy_seconds, product_seconds)
        for impl, timing in timings.items():
            extra = {
                "bytes": n_bytes,
                "flops": flops,
                "gbps": n_bytes / timing.median / 1e9,
                "tflops": flops / timing.median / 1e12,
                "bound": "matmul" if product_seconds > copy_seconds else "copy",
                "bound_seconds": bound,
                "fraction": bound / timing.median,
                "ceiling_gbps": ceiling.bandwidth / 1e9,
                "ceiling_tflops": ceiling.flops / 1e12,
                "clock": timing.clock,
                "host_seconds": timing.host,
                "calls": timing.calls,
                "input_sets": len(sets),
                "memory": "allocator" if device.type == "cuda" else "profiler",
            }
            for opponent in ("eager", "compile"):
                rival = timings.get(opponent)
                extra[f"ratio_{opponent}"] = rival.median / timing.median if rival else None
            if impl == "compile":
                extra["compile_seconds"] = compile_seconds
            outcomes[impl, mode] = Result(timing, peaks[impl], extra)
    return outcomes


CLOCK = Replay()


@pytest.mark.benchmark(timer=CLOCK)
def test_op(
    benchmark: Any, request: pytest.FixtureRequest, unit: Unit, impl: str, mode: Mode
) -> None:
    device = the_device()
    limit = request.config.getoption("--op-seconds")
    if limit is None:
        full = request.config.getoption("--full")
        limit = math.inf if full else OP_SECONDS[device.type]
    outcome = measured(unit, limit)[impl, mode]
    if isinstance(outcome, str):
        pytest.skip(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    CLOCK.run(benchmark, outcome.timing.samples)
    benchmark.extra_info.update(
        op=unit.case.op,
        size=unit.case.size,
        dtype=unit.dtype_name,
        impl=impl,
        mode=mode,
        peak_bytes=outcome.peak,
        **outcome.extra,
        **machine(device),
    )
