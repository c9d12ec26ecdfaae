"""Feed the readers with changed files; what they raise beside their own errors is kept.

Every reader runs in a process of its own, so that a crash, an endless loop or memory without end is
seen from outside. The input is on the disk before it is read.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.mutations import mutated
from tests.fuzz.readers import READERS

HANG = 20  # seconds for one file of some kB, on a busy machine
MEMORY = 1 << 30  # bytes above what the process has before


class Hang(BaseException):
    """No ``except Exception`` of a reader hides it."""


class Found(NamedTuple):
    reader: str
    what: str
    content: bytes


class Fuzz:
    """One reader with the files that it starts from."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.reader = name, READERS[name]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / self.reader.file
        self.starts = self.reader.starts(folder)
        for start in self.starts:  # what is not changed is read without a word
            self.path.write_bytes(start.pack(start.content))
            self.reader.read(self.path)

    def input(self, seed: int) -> bytes:
        rng = random.Random(f"{self.name} {seed}")
        start = rng.choice(self.starts)
        return start.pack(mutated(start.content, rng))

    def fault(self, content: bytes) -> str:
        """Why reading ``content`` went wrong; empty: it did not."""
        self.path.write_bytes(content)
        before = _peak()
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(HANG)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.reader.read(self.path)
        except self.reader.allowed as error:
            if len(str(error)) > 5000:
                return f"a message of {len(str(error))} characters"
        except Hang:
            return f"no end within {HANG} s"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.alarm(0)
        grown = _peak() - before
        return f"{grown >> 20} MiB of memory" if grown > MEMORY else ""


def _hang(*_: Any) -> None:
    raise Hang


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def fuzz(name: str, seconds: float, seed: int) -> tuple[int, list[Found]]:
    """Read changed files for so long; how many, and the first fault of each kind."""
    folder, stop = Path(tempfile.mkdtemp()), time.monotonic() + seconds
    found, count = dict[str, Found](), 0
    while time.monotonic() < stop:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read_end)
            _child(name, folder / "files", stop, seed + count, write_end)
        os.close(write_end)
        told = _all(read_end, stop + 3 * HANG, pid)
        _, status = os.waitpid(pid, 0)
        done, _, what = told.partition(b" ")
        count += int(done or 1)
        if status or what:
            path = folder / "files" / READERS[name].file
            text = what.decode() or f"status {status} of the process"
            kind = text.split(":")[0]
            found.setdefault(kind, Found(name, text, path.read_bytes()))
    shutil.rmtree(folder)
    return count, list(found.values())


def _child(name: str, folder: Path, stop: float, seed: int, pipe: int) -> None:
    """Until the first fault; tells the number of files and the fault."""
    status = 70
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        one, count, what = Fuzz(name, folder), 0, ""
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 8 * MEMORY,) * 2)
        while not what and time.monotonic() < stop:
            what = one.fault(one.input(seed + count))
            count += 1
        os.write(pipe, f"{count} {what}".encode(errors="replace"))
        status = 0
    finally:
        os._exit(status)


def _all(pipe: int, deadline: float, pid: int) -> bytes:
    """What the child tells; killed where it hangs outside of Python."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(max(1, int(deadline - time.monotonic())))
    try:
        with open(pipe, "rb") as file:
            return file.read()
    finally:
        signal.alarm(0)
