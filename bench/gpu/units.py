"""What ``bench/gpu_suite.sh`` runs: processes of a few minutes at most, the most valuable first."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
METHODS = ("ijepa", "cjepa", "njepa", "ncjepa")
#: By their share of a step.
OPS = ("predictor_tokens", "jepa_loss", "add_layer_norm", "bias_gelu", "gather_tokens")
OPS += ("ema_update_", "adamw_ema_", "patchify", "vicreg")
#: Size and variants of each race; tests hold their memory against a GPU of 80 GB.
RACES = {
    "step/vitl16": ("vitl16-224-b128", "eager,auto,static+blocks"),
    "compile/vitl16": ("vitl16-224-b128", "compile,static+blocks"),
    "step/vitb16": ("vitb16-224-b128", "eager,auto,static+blocks"),
    "step/vith14": ("vith14-224-b64", "eager,auto,static+blocks"),
    "step/vits16": ("vits16-224-b128", "eager,auto,static+blocks"),
    "shared/vitl16": ("vitl16-224-b128", "eager,reference,auto,shared"),
}
_BENCH = ("pytest_benchmark",)
_TRAINER = ("pydantic", "timm", "yaml", "safetensors")

Command = list[str]


@dataclass(frozen=True)
class Unit:
    """One process. Its stage is the name up to the slash.

    ``seconds``: of one attempt at most. ``least``: with less left of a call, it is not begun.
    ``rows``: a pytest whose tests each leave a line (``bench.gpu.ledger``). ``every_call``: says
    something about the machine, or makes something on it, which is a new one perhaps. ``modules``,
    ``tools``: must be there. ``gpu``: has no rehearsal on a CPU.
    """

    name: str
    seconds: float
    command: Command
    least: float = 20.0
    rows: bool = False
    every_call: bool = False
    modules: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    gpu: bool = False

    @property
    def stage(self) -> str:
        return self.name.partition("/")[0]


def _python(*arguments: str) -> Command:
    return [sys.executable, *arguments]


def _pytest(*arguments: str) -> Command:
    return _python("-m", "pytest", "-v", "--tb=short", *arguments)


def _bench(*arguments: str) -> Command:
    return _python("-m", "pytest", "-q", "--tb=short", *arguments, "--benchmark-only")


def _tests(name: str, *arguments: str, workers: int) -> Unit:
    """GPU tests, spread over processes where pytest-xdist is there: compiling keeps them busy."""
    spread = ["-n", str(workers)] if find_spec("xdist") else []
    command = _pytest("-m", "gpu", "--continue-on-collection-errors", *spread, *arguments)
    return Unit(name, 240, command, rows=True, modules=("pytest", "hypothesis"))


def _race(name: str, cpu: bool) -> Unit:
    size, variants = RACES[name]
    if cpu:
        size, variants = "vits16-224-b2", "eager,auto"
    environment = [("NJEPA_BENCH_STEP_SIZES", size), ("NJEPA_BENCH_STEP_VARIANTS", variants)]
    environment += [("NJEPA_BENCH_STEP_ROUNDS", "1")] if cpu else []
    return Unit(
        name, 400, _bench("bench/bench_step.py", "-k", "test_step"), 90, rows=True,
        modules=(*_BENCH, *_TRAINER), environment=tuple(environment),
    )  # fmt: skip


def _op(stage: str, op: str, sizes: tuple[str, ...], cpu: bool) -> Unit:
    sizes = ("vits16",) if cpu else sizes
    command = _bench("bench/bench_ops.py", "--ops", op, "--full", "--sizes", *sizes)
    return Unit(f"{stage}/{op}", 240, command, 30, rows=True, modules=_BENCH)


def _train(method: str, scratch: Path, cpu: bool) -> Unit:
    command = _python(
        "njepa/train.py", "--ds_config", "ds.json", f"method={method}",
        f"run.max_steps={4 if cpu else 200}", "eval.max_train=500", "eval.max_test=200",
        f"run.dir={scratch / method}", "run.progress=false", "run.tensorboard=false",
    )  # fmt: skip
    return Unit(f"train/{method}", 90, command, 45, modules=("deepspeed", *_TRAINER))


def _sanitize(tool: str) -> Unit:
    command = ["compute-sanitizer", "--error-exitcode", "9", "--tool", tool]
    command += _python("tests/gpu/sanitize.py")
    return Unit(f"sanitize/{tool}", 200, command, 100, tools=("compute-sanitizer",), gpu=True)


def _part(name: str) -> Unit:
    command = _bench(f"bench/bench_{name}.py", "--full")
    modules = (*_BENCH, *_TRAINER)
    return Unit(f"parts/{name}", 240, command, 60, rows=True, modules=modules, gpu=True)


def units(scratch: Path, cpu: bool) -> list[Unit]:
    """In order of value. ``scratch``: a folder for what a unit leaves and nobody needs."""
    philox = Unit("tests/ops", 240, _pytest("tests/ops/test_philox.py"), rows=True)
    tests = [
        _tests("tests/ops", "tests/gpu/test_ops_gpu.py", workers=8),
        _tests("tests/step", "tests/gpu/test_step_gpu.py", workers=2),
        _tests("tests/others", "tests/ops", "tests/trainer", workers=4),
    ]
    first, compiled, *races = (_race(name, cpu) for name in RACES)
    build = _python("setup.py", "--quiet", "build_ext", "--inplace")
    loader = _bench("bench/bench_loader.py")
    demo = ["--pairs", "3"] if cpu else ["--device", "cuda", "--amp"]
    return [
        Unit("env", 90, _python("-m", "bench.facts"), every_call=True),
        Unit("native", 240, build, every_call=True, modules=("setuptools",), tools=("g++",)),
        Unit("ceilings", 60, _python("-m", "bench.measure")),
        *([philox] if cpu else tests),
        first,
        compiled,
        *(_op("ops", op, ("vitl16", "n2048"), cpu) for op in OPS),
        Unit("loader", 200, loader, 60, rows=True, modules=(*_BENCH, *_TRAINER)),
        *(_train(method, scratch, cpu) for method in METHODS),
        *(_sanitize(tool) for tool in ("memcheck", "racecheck")),
        *races,
        *(_op("more-ops", op, ("vith14", "vits16", "vitb16"), cpu) for op in OPS),
        *(_part(name) for name in ("attention", "predictor")),
        Unit("accelerate", 120, _python("-m", "bench.accelerate_demo", *demo)),
    ]
