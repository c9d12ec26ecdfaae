"""Ranks that die, hang or differ: what the others say, their status, and how long it took.

    python -m tests.faults.peers [CASE ...]

Two ranks each. Prints a JSON line for each case: {case, statuses, seconds, logs, wrote}. Seconds
count from the fault, or the last step before it, to the end of the last rank; a status of None is
a process that was stopped and cannot end; wrote: the run folder was made.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.forked import fork_rank, free_port, prepare
from tests.support.jobs import TINY, make_images

TIMEOUT, STEP, LIMIT = 3, 4, 60


class Case(NamedTuple):
    rank: int = 1
    """Where the fault is."""
    signal: int = 0
    """Sent to it after ``STEP`` steps."""
    before: Callable[[], None] = lambda: None
    """Called in it before it trains."""
    overrides: tuple[str, ...] = ()
    """Of it alone."""
    present: int = 2
    """Ranks that are started."""
    stage: int = 0


def at_step(method: str, action: Callable[[Any], Any]) -> Callable[[], None]:
    """Make the loop do ``action`` before its ``method`` when ``STEP`` steps are done."""

    def patch() -> None:
        from njepa.training.loop import Loop

        real = getattr(Loop, method)

        def instead(loop: Any, *args: Any) -> Any:
            if loop.step == STEP:
                action(loop)
            return real(loop, *args)

        setattr(Loop, method, instead)

    return patch


def hang(loop: Any) -> None:
    time.sleep(1000)


def work_long(loop: Any) -> None:
    """Twice as long as the ranks may stand still; the main thread moves."""
    end = time.monotonic() + 2 * TIMEOUT
    while time.monotonic() < end:
        sum(range(1000))
        time.sleep(0.01)


def end_early(loop: Any) -> None:
    loop.setup.loader._closed.set()


def fail(loop: Any) -> None:
    raise ValueError("this rank alone")


def other_code() -> None:
    from njepa.runs import alike

    real = alike._sources
    alike._sources = lambda: real() | {"njepa/objectives.py": "0123456789ab"}


def source(name: str) -> Callable[[], None]:
    """Let ``data.path`` be another folder on this host."""

    def patch() -> None:
        from njepa.runs import alike

        real = alike.open_source
        alike.open_source = lambda path, *given, **named: real(path.parent / name, *given, **named)

    return patch


CASES = {
    "killed": Case(signal=signal.SIGKILL),
    "killed under ZeRO 2": Case(signal=signal.SIGKILL, stage=2),
    "rank 0 killed": Case(0, signal.SIGKILL),
    "stopped": Case(signal=signal.SIGSTOP),
    "rank 0 stopped": Case(0, signal.SIGSTOP),
    "hangs in a step": Case(before=at_step("advance", hang)),
    "rank 0 hangs in a save": Case(0, before=at_step("_save", hang)),
    "raises": Case(before=at_step("advance", fail)),
    "loader ends": Case(before=at_step("advance", end_early)),
    "evaluates for long": Case(0, before=at_step("_evaluate", work_long)),
    "missing": Case(present=1),
    "other settings": Case(overrides=("optim.lr=1e-3", "run.seed=5")),
    "other images": Case(before=source("others")),
    "no images": Case(before=source("nowhere")),
    "other code": Case(before=other_code),
}


def run(name: str, case: Case, root: Path) -> dict[str, Any]:
    """One case."""
    folder = root / name.replace(" ", "-")
    folder.mkdir()
    ds = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": case.stage}}
    (folder / "ds.json").write_text(json.dumps(ds))
    steps = 1_000_000 if case.signal else STEP + 2
    arguments = [
        "--ds_config", str(folder / "ds.json"), "--recipe", "shapes-tiny", *TINY,
        f"data.path={root}/images", f"data.eval_path={root}/images", f"data.cache_dir={root}/cache",
        f"run.dir={folder}/run", f"run.max_steps={steps}", "run.checkpoint_every=2",
        f"run.timeout_s={TIMEOUT}", "run.device=cpu", "eval.every=4", "eval.max_test=4",
    ]  # fmt: skip
    port, pids = free_port(), list[int]()
    for rank in range(case.present):
        own = list(case.overrides) if rank == case.rank else []
        before = case.before if rank == case.rank else lambda: None
        pids.append(fork_rank(rank, 2, port, arguments + own, folder / f"{rank}.log", before))
    metrics, lines, sent = folder / "run/metrics.jsonl", 0, False
    began = moved = ended = time.monotonic()
    statuses: dict[int, int] = {}
    able = [r for r in range(case.present) if (r, case.signal) != (case.rank, signal.SIGSTOP)]
    while not all(rank in statuses for rank in able) and time.monotonic() < began + LIMIT:
        seen = metrics.read_bytes().count(b"\n") if metrics.is_file() and not sent else lines
        if seen > lines:
            lines, moved = seen, time.monotonic()
        if case.signal and lines > STEP and not sent:
            os.kill(pids[case.rank], case.signal)
            sent, moved = True, time.monotonic()
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[rank], ended = os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.02)
    for rank, pid in enumerate(pids):
        if rank not in statuses:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    logs = [(folder / f"{rank}.log").read_text() for rank in range(case.present)]
    return {
        "case": name,
        "statuses": [statuses.get(rank) for rank in range(case.present)],
        "seconds": round(ended - moved, 1),
        "logs": logs,
        "wrote": (folder / "run").exists(),
    }


def main() -> None:
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "images", 18)
        make_images(root / "others", 19)
        for name in sys.argv[1:] or CASES:
            print(json.dumps(run(name, CASES[name], root)), flush=True)


if __name__ == "__main__":
    main()
