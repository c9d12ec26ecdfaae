"""Where the main thread of this process is, for the watch over the ranks (``njepa.runs.peers``)."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple


@dataclass
class Place:
    """What the main thread says of itself."""

    step: int = 0
    """The optimizer step in work, from 1; 0 before the first."""
    phase: str = "starting"
    marks: int = 0
    """Grows as the work goes on."""
    waits: int = 0
    """Inside of so many ``waiting``."""
    way_out: Callable[[], str] = field(default=lambda: "")
    """What a user does when the run has ended here; may read the disk."""


#: Of this process.
here = Place()


def at_step(step: int) -> None:
    """The optimizer step ``step`` begins, counted from 1."""
    here.step, here.phase = step, "training"
    moved()


def moved() -> None:
    """The work has gone on: for loops that stay in one phase for long."""
    here.marks += 1


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Around what is not a training step, such as "evaluating"."""
    before, here.phase = here.phase, name
    moved()
    try:
        yield
    finally:
        here.phase = before
        moved()


@contextmanager
def waiting() -> Iterator[None]:
    """Around a wait for other ranks that is no call of ``torch.distributed``."""
    here.waits += 1
    try:
        yield
    finally:
        here.waits -= 1


class Look(NamedTuple):
    """The main thread at one moment."""

    place: tuple[object, ...]
    """Equal as long as nothing has gone on: marks, how often the thread has slept, and the
    instruction of every function.

    The stack alone is not enough: a loop that spends nearly all of its time in one call looks the
    same at every look. Nor is the time on the CPU: a wait for a GPU spins.
    """
    waits: bool
    """Waits for other ranks."""
    at: str
    """Function and line of the innermost frame, and of the innermost one of njepa, for people."""


def look() -> Look:
    """Look at the main thread, from another one."""
    found = False
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    stack, waits, frames = list[object](), here.waits > 0, list[str]()
    while frame is not None:
        code, module = frame.f_code, str(frame.f_globals.get("__name__", ""))
        stack.append((id(code), frame.f_lasti))
        waits = waits or module.startswith("torch.distributed")
        ours = module.partition(".")[0] in ("njepa", "njepa_kernels")
        if not frames or (ours and not found):
            frames.append(f"{code.co_name} ({module}, line {frame.f_lineno})")
        found = found or ours
        frame = frame.f_back
    return Look((here.marks, _sleeps(), *stack), waits, ", called from ".join(frames))


def _sleeps() -> str:
    """How often the main thread has given up the CPU by itself; see proc_pid_status(5)."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/status") as file:
            return next(line for line in file if line.startswith("voluntary_ctxt_switches"))
    except (OSError, StopIteration):  # a container without /proc
        return ""
