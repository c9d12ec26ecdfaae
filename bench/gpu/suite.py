"""Everything that needs a GPU, on a borrowed machine: short calls, each of which may be cut off.

A call runs the units of ``bench.gpu.units`` in their order, as many as fit into ``--budget``, and
leaves in OUT at most eight files, which are complete at any moment (``kill -9`` included):

    rows.jsonl     a line for every test and benchmark as soon as it ended (bench.gpu.ledger)
    units.jsonl    a line when a unit begins and when it ends
    log.txt        the end of each unit's output; running.log: that of the one in work
    summary.txt    a line for each unit
    results/*.json what bench.report reads, one file for each GPU and day

``--resume`` continues where the last call stopped, in OUT or from the folder FROM that was brought
back from another machine. A unit that was cut continues behind its last line; one that got no
further in two calls is given up. The exit status is 1 if a unit failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu import units as plan
from bench.gpu.ledger import append_line, outcomes, read_lines
from bench.gpu.units import ROOT, Unit
from bench.report import judge
from bench.results import compact_raw, read, write

#: Of the budget, for the table and the last files.
RESERVE = 5.0
#: Of each unit's output, the end.
LOG_BYTES = 256 << 10
#: A cut unit that got no further so often is given up.
TRIES = 2
CUT = 124
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None)


class State:
    """What earlier calls and this one have done, read from the files in ``out``."""

    def __init__(self, out: Path) -> None:
        self.out, self.rows = out, out / "rows.jsonl"
        self.running = out / "running.log"

    @property
    def exists(self) -> bool:
        return (self.out / "units.jsonl").exists()

    def lines(self, unit: Unit) -> list[dict[str, Any]]:
        return [x for x in read_lines(self.out / "units.jsonl") if x.get("unit") == unit.name]

    def done_rows(self, unit: Unit) -> dict[str, str]:
        return outcomes(read_lines(self.rows), unit.name)

    def begin(self, unit: Unit) -> None:
        line = {"unit": unit.name, "event": "began", "rows": len(self.done_rows(unit))}
        append_line(self.out / "units.jsonl", line)

    def end(self, unit: Unit, rc: int | None, seconds: float, headline: str) -> None:
        line = {"unit": unit.name, "event": "ended", "rc": rc, "seconds": round(seconds, 1)}
        append_line(self.out / "units.jsonl", line | {"headline": headline})

    def stuck(self, unit: Unit) -> bool:
        """Whether the last attempts were cut, or killed with their call, and brought no row."""
        began: list[int] = []
        for line in self.lines(unit):
            if line["event"] == "began":
                began.append(line["rows"])
            elif line["rc"] not in (None, CUT):
                began.clear()
        last = began[-TRIES:]
        return len(last) == TRIES and set(last) == {len(self.done_rows(unit))}

    def finished(self, unit: Unit) -> bool:
        """Whether a later call need not run it."""
        lines = self.lines(unit)
        if not lines:
            return False
        if lines[-1]["event"] == "ended" and lines[-1]["rc"] not in (None, CUT):
            return True
        return self.stuck(unit)

    def close_log(self, unit_name: str = "") -> None:
        """The output of the unit that ran becomes part of log.txt."""
        if self.running.exists():
            content = self.running.read_bytes()
            with (self.out / "log.txt").open("ab") as file:
                file.write(f"\n==== {unit_name or 'of a call that was killed'}\n".encode())
                file.write(content[-LOG_BYTES:])
            self.running.unlink()


def obstacle(unit: Unit, cpu: bool) -> str | None:
    """Why the unit cannot run here, or None."""
    if unit.gpu and cpu:
        return "needs a CUDA device"
    for name in unit.tools:
        if shutil.which(name) is None:
            return f"{name} is not on the PATH"
    missing = [name for name in unit.modules if find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (bench/gpu/wheels.sh, --wheels)"
    return None


def _die_with_parent() -> None:
    _LIBC.prctl(_KILL_WITH_PARENT, signal.SIGKILL)


def run_command(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int:
    """Writes the output to ``log``. ``CUT`` if the time was up: the command and its children end.

    They also end with this process, whatever kills it: nothing may keep the GPU busy afterwards.
    """
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
            process_group=0,
            preexec_fn=_die_with_parent,
        )
        try:
            return process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            file.write(f"\n[time of {seconds:.0f} s is up]\n".encode())
            return CUT
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip(" =") for line in lines if line.strip(" =")]
    return said[-1][-160:] if said else ""


def run_unit(unit: Unit, state: State, seconds: float, environment: dict[str, str]) -> int:
    """One attempt, and more where the process died but got further."""
    command = list(unit.command)
    if unit.rows:
        ledger = ["-p", "bench.gpu.ledger", "--ledger", str(state.rows)]
        command[3:3] = [*ledger, "--ledger-unit", unit.name]  # behind python -m pytest
    environment = environment | dict(unit.environment)
    began = time.monotonic()
    while True:
        before = len(state.done_rows(unit))
        state.begin(unit)
        left = seconds - (time.monotonic() - began)
        rc = run_command(command, state.running, left, environment)
        # pytest: 1 some tests failed, 5 there were none (left).
        ended = rc in (0, 1, 5, CUT) or not unit.rows
        if ended or len(state.done_rows(unit)) == before:
            break
    if unit.rows and rc == 5 and state.done_rows(unit):
        rc = int("failed" in state.done_rows(unit).values())
    headline = _last_line(state.running)
    state.end(unit, rc, time.monotonic() - began, headline)
    state.close_log(unit.name)
    return rc


def keep_results(state: State) -> str:
    """The rows so far as files of results, one for each machine; says which goals they meet."""
    try:
        return _keep_results(state)
    except (OSError, ValueError) as fault:
        return f"not kept: {fault}"


def _keep_results(state: State) -> str:
    raws = defaultdict(list)
    for line in read_lines(state.rows):
        for entry in line.get("benchmarks", []):
            info = entry["extra_info"]
            raws[info.get("device"), info.get("torch")].append(line)
    verdicts: list[str] = []
    for lines in raws.values():
        path = write(compact_raw(lines, str(state.rows)), state.out / "results")
        verdicts += [line[4] for line in judge(read(path)) if line[4] != "not run"]
    return f"{verdicts.count('met')} of {len(verdicts)} goals met"


def summary(state: State, units: list[Unit], notes: dict[str, str]) -> str:
    table = [("unit", "s", "rc", "rows", "headline")]
    for unit in units:
        lines = state.lines(unit)
        ended = [line for line in lines if line["event"] == "ended"]
        last = ended[-1] if ended else {"rc": None, "seconds": 0.0, "headline": ""}
        found = list(state.done_rows(unit).values())
        counts = ", ".join(f"{found.count(o)} {o}" for o in dict.fromkeys(found))
        note = notes.get(unit.name) or ("given up" if lines and state.stuck(unit) else "")
        headline = "; ".join(filter(None, (note, last["headline"])))
        rc = "-" if last["rc"] is None else str(last["rc"])
        table.append((unit.name, f"{last['seconds']:.0f}", rc, counts, headline))
    return "\n".join(f"{a:<26} {b:>5} {c:>4}  {d:<34}  {e}".rstrip() for a, b, c, d, e in table)


def _choice(text: str) -> list[str]:
    known = list(dict.fromkeys(unit.stage for unit in plan.units(Path(), False)))
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stage {unknown[0]!r}; there are {', '.join(known)}")
    return names


def _begin(parser: argparse.ArgumentParser, out: Path, resume: str | None) -> State:
    """The state to continue; refuses to mix two runs."""
    state = State(out)
    if state.exists and resume is None:
        parser.error(
            f"{out} holds a run; continue it with --resume, or choose another OUT to start over"
        )
    if resume:
        source = State(Path(resume).resolve())
        if source.out != out:
            if state.exists:
                parser.error(f"{out} holds a run; --resume {resume} needs an OUT without one")
            if not source.exists:
                parser.error(f"--resume: {resume} holds no units.jsonl of an earlier call")
            shutil.copytree(source.out, out, dirs_exist_ok=True)
    elif resume == "" and not state.exists:
        parser.error(f"--resume: {out} holds no units.jsonl of an earlier call")
    out.mkdir(parents=True, exist_ok=True)
    state.close_log()
    return state


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/gpu_suite.sh", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "runs" / "gpu-suite")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for this call (540)")
    parser.add_argument("--resume", nargs="?", const="", metavar="FROM", help="go on (see above)")
    parser.add_argument("--only", type=_choice, help="stages, separated by commas")
    parser.add_argument("--skip", type=_choice, default=[], help="stages to leave out")
    parser.add_argument("--data", type=Path, help="folder of the images (decode60.zip, ...)")
    parser.add_argument("--cpu", action="store_true", help="rehearsal: tiny, without the GPU")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    environment = dict(os.environ)
    if given.cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device; --cpu rehearses without one")
    if given.data is not None:
        if not given.data.is_dir():
            parser.error(f"--data: {given.data} is no folder")
        environment["NJEPA_DATA"] = str(given.data.resolve())
    state = _begin(parser, given.out.resolve(), given.resume)
    notes: dict[str, str] = {}
    results = keep_results(state) if state.rows.exists() else "none yet"
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        chosen = [
            unit
            for unit in plan.units(Path(scratch), given.cpu)
            if unit.stage not in given.skip and (not given.only or unit.stage in given.only)
        ]
        for unit in chosen:
            if state.stuck(unit) or (state.finished(unit) and not unit.every_call):
                continue  # what is given up must not eat every call, either
            left = given.budget - RESERVE - (time.monotonic() - began)
            if reason := obstacle(unit, given.cpu):
                notes[unit.name] = f"skipped: {reason}"
            elif left < min(unit.least, unit.seconds):
                notes[unit.name] = "no time in this call"
            else:
                sys.stdout.write(f"{unit.name}: at most {min(unit.seconds, left):.0f} s\n")
                sys.stdout.flush()
                rc = run_unit(unit, state, min(unit.seconds, left), environment)
                failed |= rc not in (0, CUT)
                if unit.rows:
                    results = keep_results(state)
            (state.out / "summary.txt").write_text(summary(state, chosen, notes) + "\n")
        unfinished = [u.name for u in chosen if not (state.finished(u) or u.name in notes)]
        unfinished += [name for name, note in notes.items() if note == "no time in this call"]
    sys.stdout.write("\n" + summary(state, chosen, notes) + "\n")
    sys.stdout.write(f"results: {results}\n")
    left_over = ", ".join(unfinished) or "nothing"
    sys.stdout.write(f"left for --resume: {left_over}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
