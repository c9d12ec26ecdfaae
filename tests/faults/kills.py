"""kill -9 at random moments, and the run that goes on equals the one nobody killed, bit for bit.

    python -m tests.faults.kills --kills 24 --seed 1

Each case is a run with its own method, loader, ranks, ZeRO stage and precision. It is trained once
in peace, and once under kills of all its processes: at a random step, as soon as a checkpoint is
being written, or while it starts. Compared are the losses of every step, also of those that a kill
made it train twice, and all tensors of the last checkpoint: weights, moments, counts of updates,
buffers, target encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support.forked import fork_rank, free_port, prepare
from tests.support.jobs import TINY, make_images
from tests.support.written import differences

STEPS, BATCH, IMAGES = 12, 4, 26  # an epoch is 6 steps
PRECISIONS = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True}},
    "bf16": {"bf16": {"enabled": True}},
}
MOMENTS = ("step", "write", "start", "write", "step")
_LIMIT = 600.0  # seconds for a start to get anywhere


class Case(NamedTuple):
    method: str
    loader: str
    ranks: int
    stage: int
    precision: str

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return f"{self.method}, {self.loader}, {ranks}, ZeRO {self.stage}, {self.precision}"


CASES = [
    Case("ijepa", "torch", 1, 0, "fp32"),
    Case("cjepa", "dali", 2, 1, "fp32"),
    Case("njepa", "torch", 2, 2, "bf16"),
    Case("ncjepa", "dali", 1, 3, "autocast"),
    Case("ncjepa", "torch", 2, 0, "autocast"),
    Case("njepa", "dali", 1, 1, "bf16"),
    Case("cjepa", "torch", 1, 2, "fp32"),
    Case("ijepa", "dali", 2, 3, "bf16"),
]


@dataclass
class Kill:
    """What happened at one."""

    moment: str
    step: int
    """Last step that was logged."""
    writing: bool
    """An unfinished checkpoint was on the disk."""
    resumed: int = -1
    """Step that the run went on from."""


class Run:
    """The processes of one run, and what is known of it from its folder."""

    def __init__(self, case: Case, root: Path, name: str) -> None:
        self.case, self.root, self.dir = case, root, root / name
        self._starts, self._pids = 0, list[int]()
        self._ds = root / f"{name}.json"
        zero = {"stage": case.stage, "stage3_param_persistence_threshold": 100}
        sizes = {"train_micro_batch_size_per_gpu": BATCH // case.ranks, "zero_optimization": zero}
        self._ds.write_text(json.dumps(sizes | PRECISIONS[case.precision]))

    def start(self) -> None:
        self._starts += 1
        port, ranks = free_port(), range(self.case.ranks)
        self._pids = [
            fork_rank(rank, len(ranks), port, self._arguments(), self.log(rank), self.in_child)
            for rank in ranks
        ]

    def in_child(self) -> None:
        """In the process that will train, before it does."""

    def _arguments(self) -> list[str]:
        case = self.case
        return [
            "--ds_config", str(self._ds), "--recipe", "shapes-tiny", *TINY, f"method={case.method}",
            f"data.backend={case.loader}", f"data.workers={1 if case.loader == 'torch' else 0}",
            f"data.path={self.root}/images", f"data.cache_dir={self.root}/cache",
            f"run.dir={self.dir}", f"run.max_steps={STEPS}", "run.checkpoint_every=2",
            "run.resume=true", "run.device=cpu",
        ]  # fmt: skip

    def log(self, rank: int) -> Path:
        return self.root / f"{self.dir.name}-{self._starts}-rank{rank}.log"

    def ended(self) -> bool:
        """Whether a process has ended by itself; all of them must then end well."""
        done = os.waitpid(self._pids[0], os.WNOHANG) if self._pids else (0, 0)
        if not done[0]:
            return False
        first, self._pids = done[1], self._pids[1:]
        if first:  # the others would wait for it
            self.kill()
        statuses = [first, *(os.waitpid(pid, 0)[1] for pid in self._pids)]
        self._pids = []
        if any(statuses):
            logs = "\n".join(self.log(r).read_text()[-3000:] for r in range(self.case.ranks))
            raise AssertionError(f"{self.case}: status {statuses}\n{logs}")
        return True

    def finish(self) -> None:
        while not self.ended():
            time.sleep(0.02)

    def kill(self) -> None:
        for pid in self._pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # killed before it made its own group
                os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            os.waitpid(pid, 0)
        self._pids = []

    def losses(self) -> dict[int, float]:
        """Of all steps in metrics.jsonl; a last line that was cut off is none."""
        path, found = self.dir / "metrics.jsonl", {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if "loss" in entry:
                found[entry["step"]] = entry["loss"]
        return found

    def unfinished(self) -> list[str]:
        return sorted(p.name for p in (self.dir / "checkpoints").glob(".step-*.tmp"))

    def complete(self) -> int:
        """Step of the newest checkpoint."""
        return max(
            (int(p.name[5:]) for p in (self.dir / "checkpoints").glob("step-????????")), default=0
        )

    def last(self) -> Path:
        return self.dir / "checkpoints" / f"step-{STEPS:08d}"


def kill_at(run: Run, moment: str, rng: random.Random) -> Kill | None:
    """Start, wait for the moment, kill; None: it was done before."""
    before = run.complete()
    wait = rng.uniform(0, 0.05)
    target = rng.randint(min(before + 1, STEPS - 1), STEPS - 1)
    early = rng.uniform(0, 3)
    run.start()
    began = time.monotonic()
    while not run.ended():
        if moment == "start":
            reached = time.monotonic() - began > early
        elif moment == "step":
            reached = max(run.losses(), default=0) >= target
        else:
            reached = any(int(name[6:14]) >= target for name in run.unfinished())
        if reached or time.monotonic() - began > _LIMIT:
            time.sleep(wait if moment != "write" else wait / 10)
            run.kill()
            writing = moment != "start" and bool(run.unfinished())  # else of the kill before
            return Kill(moment, max(run.losses(), default=0), writing)
        time.sleep(0.0005)
    return None


def killed_run(case: Case, root: Path, kills: int, rng: random.Random, offset: int = 0) -> str:
    """One case, for the table.

    Raises:
        AssertionError: a number differs.
    """
    tag = f"{case.method}-{case.loader}-{case.ranks}-{case.stage}"
    whole, killed = Run(case, root, f"{tag}-whole"), Run(case, root, f"{tag}-killed")
    whole.start()
    whole.finish()
    expected = whole.losses()
    assert sorted(expected) == list(range(1, STEPS + 1))
    happened, trained = list[Kill](), 0
    for n in range(kills):
        kill = kill_at(killed, MOMENTS[(offset + n) % len(MOMENTS)], rng)
        if kill is None:
            break
        kill.resumed = killed.complete()
        happened.append(kill)
        seen = killed.losses()
        trained += len(seen)
        assert all(seen[step] == expected[step] for step in seen), (case, seen, expected)
    killed.start()
    killed.finish()
    assert killed.losses() == expected, (case, killed.losses(), expected)
    wrong = differences(whole.last(), killed.last())
    assert not wrong, (case, wrong)
    told = ", ".join(
        f"{k.moment} {k.step}{' (writing)' if k.writing else ''} -> {k.resumed}" for k in happened
    )
    writing = sum(k.writing for k in happened)
    return f"| {case} | {len(happened)} | {writing} | {told} | equal |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", default="", help="numbers like 0,3; default: all")
    args = parser.parse_args()
    prepare()
    chosen = [int(n) for n in args.cases.split(",") if n] or range(len(CASES))
    cases = [CASES[n] for n in chosen]
    rng, began = random.Random(args.seed), time.monotonic()
    print("| run | kills | in a write | moment, step -> step resumed from | losses, last state |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "images", IMAGES)
        for n, case in enumerate(cases):
            share = args.kills // len(cases) + (n < args.kills % len(cases))
            print(killed_run(case, Path(folder), share, rng, n), flush=True)
    print(f"{time.monotonic() - began:.0f} s, seed {args.seed}")


if __name__ == "__main__":
    main()
