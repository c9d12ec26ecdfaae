"""The stages of ``bench/gpu_suite.sh``: what needs a GPU, each bounded in time, none fatal.

After every stage OUT holds its log, its JSON and ``summary.json``, so a run that is cut short
loses only the stage it was in. A stage whose dependency is missing is skipped with the reason; one
for which too little of ``--budget`` is left is shortened or skipped. The exit status is 1 if a
stage failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.report import judge
from bench.results import compact, read, write

ROOT = Path(__file__).parents[1]
#: A stage is not begun with less time than this, seconds.
LEAST = 5.0
METHODS = ("ijepa", "cjepa", "njepa", "ncjepa")

Command = list[str]


@dataclass(frozen=True)
class Stage:
    """``commands(out, cpu, seconds)`` run one after the other within ``seconds`` in all.

    ``modules``, ``files``, ``tools`` must be there; ``gpu``: has no rehearsal on a CPU.
    """

    name: str
    seconds: float
    commands: Callable[[Path, bool, float], list[Command]]
    modules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    gpu: bool = False
    raw: bool = False


@dataclass
class Outcome:
    """A line of the summary. ``rc`` None: skipped; 124: its time was up."""

    stage: str
    seconds: float = 0.0
    rc: int | None = None
    headline: str = ""
    commands: list[str] = field(default_factory=list)


def _python(*arguments: str) -> Command:
    return [sys.executable, *arguments]


def _facts(out: Path, cpu: bool, seconds: float) -> list[Command]:
    first = [] if cpu or not shutil.which("nvidia-smi") else [["nvidia-smi"]]
    return [*first, _python("-m", "bench.facts")]


def _native(out: Path, cpu: bool, seconds: float) -> list[Command]:
    return [_python("setup.py", "--quiet", "build_ext", "--inplace")]


def _tests(out: Path, cpu: bool, seconds: float) -> list[Command]:
    if cpu:
        return [_python("-m", "pytest", "-q", "tests/ops/test_philox.py")]
    folders = [name for name in ("tests/gpu", "tests/ops") if (ROOT / name).is_dir()]
    return [_python("-m", "pytest", "-q", "-m", "gpu", *folders)]


def _sanitize(out: Path, cpu: bool, seconds: float) -> list[Command]:
    checker = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    script = _python("tests/gpu/sanitize.py")
    return [[*checker, tool, *script] for tool in ("memcheck", "racecheck")]


def _ceilings(out: Path, cpu: bool, seconds: float) -> list[Command]:
    return [_python("-m", "bench.measure")]


def _benchmark(file: str) -> Callable[[Path, bool, float], list[Command]]:
    def commands(out: Path, cpu: bool, seconds: float) -> list[Command]:
        raw = out / f"{Path(file).stem.removeprefix('bench_')}.raw.json"
        run = _python("-m", "pytest", "-q", file, "--benchmark-only", f"--benchmark-json={raw}")
        if file.endswith("bench_ops.py"):
            # What was begun last still has to end, and the file to be written.
            run += [f"--op-seconds={0.7 * seconds:.0f}"]
            run += ["--ops", "gather_tokens", "--sizes", "vits16"] if cpu else []
        return [run]

    return commands


def _accelerate(out: Path, cpu: bool, seconds: float) -> list[Command]:
    size = ["--pairs", "3"] if cpu else ["--device", "cuda", "--amp"]
    return [_python("bench/accelerate_demo.py", *size)]


def _train(out: Path, cpu: bool, seconds: float) -> list[Command]:
    steps = 4 if cpu else 200
    train = _python("njepa/train.py", "--ds_config", "ds.json", f"run.max_steps={steps}")
    train += ["eval.max_train=500", "eval.max_test=200"]
    return [[*train, f"method={name}", f"run.dir={out / 'train' / name}"] for name in METHODS]


_TRAINER = ("pydantic", "timm", "yaml", "safetensors")
STAGES = [
    Stage("env", 30, _facts),
    Stage("native", 180, _native, modules=("setuptools",), tools=("g++",)),
    Stage("ceilings", 40, _ceilings),
    Stage("tests", 180, _tests, modules=("pytest", "hypothesis")),
    Stage(
        "sanitize",
        60,
        _sanitize,
        files=("tests/gpu/sanitize.py",),
        tools=("compute-sanitizer",),
        gpu=True,
    ),
    Stage("ops", 480, _benchmark("bench/bench_ops.py"), modules=("pytest_benchmark",), raw=True),
    Stage(
        "step",
        240,
        _benchmark("bench/bench_step.py"),
        modules=("pytest_benchmark", *_TRAINER),
        files=("bench/bench_step.py",),
        raw=True,
    ),
    Stage(
        "loader",
        120,
        _benchmark("bench/bench_loader.py"),
        modules=("pytest_benchmark", *_TRAINER),
        files=("bench/bench_loader.py",),
        raw=True,
    ),
    Stage("accelerate", 60, _accelerate, files=("bench/accelerate_demo.py",)),
    Stage("train", 240, _train, modules=("deepspeed", "tensorboard", *_TRAINER)),
]


def obstacle(stage: Stage, cpu: bool, cuda: bool) -> str | None:
    """Why the stage cannot run, or None."""
    if stage.gpu and (cpu or not cuda):
        return "needs a CUDA device"
    for name in stage.files:
        if not (ROOT / name).exists():
            return f"{name} does not exist"
    for name in stage.tools:
        if shutil.which(name) is None:
            return f"{name} is not on the PATH"
    missing = [name for name in stage.modules if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (bench/gpu_wheels.sh, --wheels)"
    return None


def run_command(command: Command, log: Path, seconds: float, environment: dict[str, str]) -> int:
    """Appends the output to ``log``. 124 if the time was up: the command and its children end."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            file.write(f"\n[time of {seconds:.0f} s is up]\n".encode())
            return 124
        finally:
            # Also when this run itself is ended: nothing of a stage outlives it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip(" =") for line in lines if line.strip(" =")]
    return said[-1][-160:] if said else ""


def _keep_results(out: Path) -> str:
    """All raw benchmark files so far as one file of results; its headline are the goals."""
    path = write(compact(sorted(out.glob("*.raw.json"))), out / "results")
    verdicts = [line[4] for line in judge(read(path))]
    return f"{verdicts.count('met')} of {len(verdicts)} goals met; {path.relative_to(out)}"


def run_stage(stage: Stage, out: Path, cpu: bool, seconds: float) -> Outcome:
    outcome = Outcome(stage.name)
    log = out / f"{stage.name}.log"
    log.unlink(missing_ok=True)
    environment = dict(os.environ)
    if cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    began = time.monotonic()
    for command in stage.commands(out, cpu, seconds):
        left = seconds - (time.monotonic() - began)
        rc = run_command(command, log, left, environment)
        outcome.commands.append(" ".join(command))
        outcome.rc = outcome.rc or rc
        if rc == 124:
            break
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.headline = _last_line(log)
    if stage.raw and outcome.rc in (0, 1):  # 1: a check failed; the other rows are right
        try:
            outcome.headline += "; " + _keep_results(out)
        except (OSError, ValueError) as fault:
            outcome.rc = 1
            outcome.headline += f"; results not kept: {fault}"
    return outcome


def summary(outcomes: list[Outcome]) -> str:
    lines = [("stage", "seconds", "rc", "headline")]
    for o in outcomes:
        lines.append(
            (o.stage, f"{o.seconds:.1f}", "skip" if o.rc is None else str(o.rc), o.headline)
        )
    return "\n".join(f"{a:<10} {b:>7} {c:>4}  {d}" for a, b, c, d in lines)


def _names(text: str) -> list[str]:
    known = [stage.name for stage in STAGES]
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stage {unknown[0]!r}; there are {', '.join(known)}")
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/gpu_suite.sh", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "runs" / "gpu-suite")
    parser.add_argument("--only", type=_names, help="stages, separated by commas")
    parser.add_argument("--skip", type=_names, default=[], help="stages to leave out")
    parser.add_argument("--budget", type=float, help="seconds for everything")
    parser.add_argument("--cpu", action="store_true", help="rehearsal: tiny, without the GPU")
    given = parser.parse_args(arguments)
    import torch

    cuda = torch.cuda.is_available()
    if not given.cpu and not cuda:
        parser.error("torch sees no CUDA device; --cpu rehearses without one")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("*.raw.json"):
        stale.unlink()
    began = time.monotonic()
    outcomes: list[Outcome] = []
    for stage in STAGES:
        if stage.name in given.skip or (given.only and stage.name not in given.only):
            continue
        seconds, reason = stage.seconds, obstacle(stage, given.cpu, cuda)
        if given.budget is not None:
            seconds = min(seconds, given.budget - (time.monotonic() - began))
            if reason is None and seconds < LEAST:
                reason = f"the budget of {given.budget:.0f} s is used up"
        if reason is not None:
            outcomes.append(Outcome(stage.name, headline=f"skipped: {reason}"))
        else:
            sys.stdout.write(f"{stage.name}: at most {seconds:.0f} s\n")
            sys.stdout.flush()
            outcomes.append(run_stage(stage, out, given.cpu, seconds))
        text = json.dumps([asdict(o) for o in outcomes], indent=1)
        (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write("\n" + summary(outcomes) + "\n")
    return 1 if any(o.rc for o in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
