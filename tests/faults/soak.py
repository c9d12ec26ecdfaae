"""A training for minutes while things break: `make soak MINUTES=30`.

    python -m tests.faults.soak --minutes 30 [--seed 1]

A third of the time one process trains on a disk that fills up, is emptied and turns slow; its
memory, open handles and threads (with those of its loader) are sampled every second. The rest of
the time a second run, with the same settings, goes through the same steps under kill -9 and SIGTERM
too. One of the images is cut short. Checked are

- flat: from the middle third of the samples to the last one, the median memory grows by no more
  than 2 %, and the fewest handles and threads, those while no save is under way, do not grow;
- nothing lost: every loss that the second run logs, at whatever time it makes a step, is that of
  the first bit for bit, and so are all tensors of the last checkpoint that both have;
- no traceback, and never a start without a checkpoint to go on from once there was one.

Prints a table; status 1 where a check fails. Filling a disk needs root (a mount); without, that
fault is left out and the table says so.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from njepa.runs.signals import STEPS_LOST, STOPPED
from tests.faults.kills import Case, Run
from tests.support.disks import fill, mounted
from tests.support.forked import prepare
from tests.support.jobs import make_images
from tests.support.written import differences

CASE = Case("ncjepa", "torch", 1, 0, "fp32")
IMAGES, EVERY, COMMON = 120, 20, 100  # images; steps between checkpoints; those kept for ever
GROWTH = 1.02
LIMIT = 120.0  # seconds that a process may take to end


class Soaked(Run):
    """A run on a disk of its own, without an end, that can be made slow and full."""

    def __init__(self, root: Path, disk: Path, name: str) -> None:
        super().__init__(CASE, root, name)
        self.dir, self.slow, self.filler = disk / name, root / "slow", disk / "full"
        self.samples: list[tuple[int, int, int]] = []

    def _arguments(self) -> list[str]:
        return [
            *super()._arguments(), "run.max_steps=1000000", f"run.checkpoint_every={EVERY}",
            f"run.keep_every={COMMON}",
        ]  # fmt: skip

    def in_child(self) -> None:
        fsync = os.fsync

        def slow_fsync(handle: int) -> None:
            if self.slow.exists():
                time.sleep(1.0)
            fsync(handle)

        os.fsync = slow_fsync

    @property
    def pid(self) -> int:
        return self._pids[0]

    def alive(self) -> bool:
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if ended:
            self._pids, self.status = [], os.waitstatus_to_exitcode(status)
        return bool(self._pids)

    def begin(self) -> None:
        """Start, and wait for the first new step."""
        before = max(self.losses(), default=0)
        self.start()
        self.until(lambda: max(self.losses(), default=0) > before)

    def until(self, reached, limit: float = LIMIT) -> None:
        deadline = time.monotonic() + limit
        while not reached():
            assert self.alive(), self.text()
            assert time.monotonic() < deadline, f"nothing for {limit} s\n{self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        return self.log(0).read_text(errors="replace")

    def end(self) -> None:
        """By SIGTERM to all of its processes; status 1 and 76: the last save failed."""
        os.killpg(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + LIMIT
        while self.alive():
            assert time.monotonic() < deadline, f"SIGTERM, and no end\n{self.text()}"
            time.sleep(0.05)
        assert self.status in (1, STOPPED, STEPS_LOST), f"status {self.status}\n{self.text()}"
        assert "Traceback" not in self.text(), self.text()

    def sample(self) -> None:
        """Bytes, handles and threads of the process and its loader."""
        found = [0, 0, 0]
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for pid in (str(self.pid), *children):
            try:
                found[0] += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
                found[1] += len(os.listdir(f"/proc/{pid}/fd"))
                found[2] += len(os.listdir(f"/proc/{pid}/task"))
            except OSError:
                return  # a child that has just ended
        self.samples.append((found[0], found[1], found[2]))

    def rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.sample()
            assert self.alive(), self.text()
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def inject(run: Soaked, kind: str, rng: random.Random) -> None:
    """One fault; a run that it ends is started again."""
    if "full" in kind:
        fill(run.filler)
    if "slow" in kind:
        run.slow.touch()
    run.rest(rng.uniform(0.5, 4.0))
    if "kill" in kind:
        run.kill()
    elif "SIGTERM" in kind:
        run.end()
    run.filler.unlink(missing_ok=True)
    run.slow.unlink(missing_ok=True)
    if run._pids:
        run.rest(rng.uniform(0.5, 2.0))
        return
    saved = run.complete()
    run.begin()
    assert not saved or "starting at step 0" not in run.text(), run.text()


def soak(run: Soaked, kinds: list[str], seconds: float, rng: random.Random) -> Counter[str]:
    """Faults of these kinds, in turn, for so long."""
    stop, done = time.monotonic() + seconds, Counter[str]()
    run.begin()
    while time.monotonic() < stop:
        kind = kinds[done.total() % len(kinds)]
        inject(run, kind, rng)
        done[kind] += 1
    run.end()
    return done


def growth(samples: list[tuple[int, int, int]]) -> tuple[list[str], bool]:
    """Middle third against the last one, for the table; whether all is flat."""
    third = len(samples) // 3
    assert third >= 5, f"{len(samples)} samples are too few to judge: more minutes"
    middle, last = samples[third : 2 * third], samples[2 * third :]
    rows, flat = [], True
    judged = (("memory, MB", statistics.median), ("handles", min), ("threads", min))
    for k, (name, of) in enumerate(judged):
        before, after = (of([sample[k] for sample in part]) for part in (middle, last))
        fine = after <= before * (GROWTH if k == 0 else 1)
        unit = 1e6 if k == 0 else 1
        rows.append(f"| {name} | {before / unit:.6g} | {after / unit:.6g} | {_word(fine)} |")
        flat &= fine
    return rows, flat


def compare(steady: Soaked, beaten: Soaked) -> tuple[list[str], bool]:
    """Losses and the last common checkpoint of both, for the table."""
    first, second = steady.losses(), beaten.losses()
    wrong = [step for step in second if step in first and second[step] != first[step]]
    common = [
        name for name in sorted(p.name for p in (beaten.dir / "checkpoints").glob("step-????????"))
        if (steady.dir / "checkpoints" / name).is_dir()
    ]  # fmt: skip
    assert common, "no checkpoint that both runs have: more minutes"
    place = common[-1]
    other = differences(*(run.dir / "checkpoints" / place for run in (steady, beaten)))
    shared = len(first.keys() & second.keys())
    return [
        f"| losses of {shared} steps | {len(wrong)} differ | {_word(not wrong)} |",
        f"| tensors of {place} | {len(other)} differ | {_word(not other)} |",
    ], not wrong and not other


def _word(fine: bool) -> str:
    return "ok" if fine else "**bad**"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    prepare()
    rng, seconds = random.Random(args.seed), 60 * args.minutes
    with tempfile.TemporaryDirectory() as name, mounted(Path(name) / "disk", "512m") as own:
        root = Path(name)
        make_images(root / "images", IMAGES)
        cut = root / "images" / "class0" / "0000.jpg"
        cut.write_bytes(cut.read_bytes()[:-300])
        steady, beaten = (Soaked(root, root / "disk", name) for name in ("steady", "beaten"))
        mild = ["slow", *(["full", "full and slow"] if own else [])]
        hard = ["kill", "SIGTERM", *mild, "kill, slow", "SIGTERM, slow"]
        hard += ["kill, full", "SIGTERM, full"] if own else []
        try:
            tries = [soak(steady, mild, seconds / 3, rng), soak(beaten, hard, seconds * 2 / 3, rng)]
        finally:
            steady.kill()
            beaten.kill()
        flat, is_flat = growth(steady.samples)
        same, is_same = compare(steady, beaten)
        left = steady.unfinished() + beaten.unfinished()
    print(f"{args.minutes:g} minutes, seed {args.seed}" + ", no full disk" * (not own))
    print("| fault | one process | with restarts |\n|---|---|---|")
    for kind in hard:
        print(f"| {kind} | {tries[0][kind]} | {tries[1][kind]} |")
    print("| one process | middle third | last third | |\n|---|---|---|---|", *flat, sep="\n")
    print("| of both | | |\n|---|---|---|", *same, sep="\n")
    print(f"| unfinished checkpoints left | {len(left)} | {_word(not left)} |")
    return 0 if is_flat and is_same and not left else 1


if __name__ == "__main__":
    sys.exit(main())
