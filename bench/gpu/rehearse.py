"""The suite on a CPU under its real limits, with ``kill -9`` at random moments:

    python -m bench.gpu.rehearse OUT [--kills 4] [--limit 600] [--seed 0] [-- --only ops,step]

A call gets ``--limit`` seconds as on a borrowed machine; the first ``--kills`` calls are killed at
a moment drawn from that time. The next call continues in a new folder from a copy of what is there,
as on a fresh machine. After every call each line that was ever there must still be there, no
finished test may have run twice, and what comes back must be at most eight files of 16 MiB, two
folders deep. A call that ended by itself must leave no process. What follows ``--`` goes to the
suite.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.gpu.ledger import read_lines
from bench.gpu.units import ROOT

FILES, BYTES, DEPTH = 8, 16 << 20, 2
#: After so many the suite is taken not to end.
CALLS = 40
#: So that the processes of a call can be told from others.
MARK = "NJEPA_REHEARSAL"
KEPT = ("rows.jsonl", "units.jsonl")
#: Whether a call is to be killed now, by its folder and its seconds so far.
Due = Callable[[Path, float], bool]


def alive(mark: str) -> list[int]:
    """Processes that carry the mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has just ended
                continue
            if f"{MARK}={mark}".encode() in environment.split(b"\0") and state != "Z":
                found.append(int(folder.name))
    return found


def call(
    command: list[str], mark: str, limit: float, due: Due | None, folder: Path
) -> tuple[bool, str]:
    """Whether the call ended by itself, and its output."""
    log = folder.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {MARK: mark}, stdout=file,
            stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
        began = time.monotonic()
        while process.poll() is None:
            elapsed = time.monotonic() - began
            if elapsed > limit or (due is not None and due(folder, elapsed)):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.05)
    ended, left = process.returncode >= 0, alive(mark)
    for pid in left:  # as on a borrowed machine, where nothing outlives its call
        os.kill(pid, signal.SIGKILL)
    assert not (ended and left), f"processes outlived their call: {left}"
    return ended, log.read_text(encoding="utf-8", errors="replace")


def check_kept(before: dict[str, list[dict[str, object]]], out: Path) -> None:
    """Every line that was there is there, in its place."""
    for name in KEPT:
        now, old = read_lines(out / name), before.get(name, [])
        assert now[: len(old)] == old, f"{name}: lines are lost"
    ended = Counter(
        (line["unit"], line["test"])
        for line in read_lines(out / "rows.jsonl")
        if line["outcome"] != "began"
    )
    twice = [key for key, count in ended.items() if count > 1]
    assert not twice, f"run again although finished: {twice}"


def check_size(out: Path) -> None:
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= FILES, sorted(map(str, files))
    assert all(path.stat().st_size <= BYTES for path in files)
    assert all(len(path.relative_to(out).parts) <= DEPTH + 1 for path in files)


def rehearse(suite: list[str], out: Path, kills: list[Due], limit: float) -> str:
    """Runs the suite to its end, says a line for each call, and returns the last one's output.

    Raises:
        AssertionError: something that was finished is lost, or a process survived.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept: dict[str, list[dict[str, object]]] = {}
    last = None
    for number in range(1, CALLS + 1):
        folder = out / f"call-{number}"
        resume = ["--resume", str(last)] if last else []
        began = time.monotonic()
        due = kills[number - 1] if number <= len(kills) else None
        command = [*suite, str(folder), *resume]
        ended, output = call(command, f"{os.getpid()}-{number}", limit, due, folder)
        if (folder / "units.jsonl").exists():
            last = folder
        assert last or not ended, f"the suite failed:\n{output[-4000:]}"
        if last is None:
            continue  # killed before its first line
        check_kept(kept, last)
        check_size(last)
        kept = {name: read_lines(last / name) for name in KEPT}
        rows = sum(line["outcome"] != "began" for line in kept["rows.jsonl"])
        units = sum(line["event"] == "ended" for line in kept["units.jsonl"])
        sys.stdout.write(
            f"call {number}: {'ended' if ended else 'kill -9'} after "
            f"{time.monotonic() - began:.0f} s; {rows} rows, {units} units ended; none lost\n"
        )
        sys.stdout.flush()
        assert not ended or "left for --resume" in output, f"the suite failed:\n{output[-4000:]}"
        if ended and "left for --resume: nothing" in output:
            return output
    raise AssertionError(f"not finished after {CALLS} calls")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.rehearse", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of a call")
    parser.add_argument("--seed", type=int, default=0)
    mine, _, others = "\0".join(sys.argv[1:]).partition("\0--\0")
    given = parser.parse_args(mine.split("\0") if mine else [])
    suite = ["bash", "bench/gpu_suite.sh", "--cpu", "--budget", f"{0.9 * given.limit:.0f}"]
    os.environ.setdefault("PYTHON", sys.executable)
    moments = random.Random(given.seed)
    drawn = [moments.uniform(0, given.limit) for _ in range(given.kills)]
    kills = [partial(_after, seconds) for seconds in drawn]
    out = rehearse(
        [*suite, *filter(None, others.split("\0"))], given.out.resolve(), kills, given.limit
    )
    sys.stdout.write(out)
    return 0


def _after(seconds: float, folder: Path, elapsed: float) -> bool:
    return elapsed > seconds


if __name__ == "__main__":
    raise SystemExit(main())
