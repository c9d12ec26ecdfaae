"""Decode many images in processes that may die: a decoder that crashes ends one process only."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

import torch

from njepa.data.errors import DecodeError
from njepa.data.fork_guard import forking
from njepa.data.index import ImageIndex
from njepa.data.pixels import decode_sample

_PATIENCE = 5.0  # seconds for the image in work
_fork = get_context("fork")  # shares the index


def faults(index: ImageIndex, chunks: Iterable[range], workers: int) -> Iterator[tuple[int, str]]:
    """Each sample of ``chunks`` with what is wrong with it (empty: nothing), in any order.

    A process that dies has the image to blame that it had in work; another one goes on with the
    next. The processes end when the iterator does, and when this process is killed.
    """
    waiting = deque(chunks)
    team: dict[Connection, _Worker] = {}
    try:
        while True:
            idle = [worker for worker in team.values() if not worker.left]
            while waiting and (idle or len(team) < workers):
                worker = idle.pop() if idle else _Worker(index, list(team))
                team[worker.line] = worker
                worker.take(waiting.popleft())
            busy = [line for line, worker in team.items() if worker.left]
            if not busy:
                return
            for line in wait(busy):
                worker = team[line]  # type: ignore[index]
                sample, worker.left = worker.left[0], worker.left[1:]
                try:
                    fault: str = worker.line.recv()
                except (EOFError, OSError):
                    fault = f"ends the process that decodes it ({worker.end()})"
                    del team[worker.line]
                    waiting.extendleft([worker.left] if worker.left else [])
                yield sample, fault
    finally:
        for worker in team.values():
            worker.end()


class _Worker:
    """A process, and the line to it."""

    def __init__(self, index: ImageIndex, others: list[Connection]) -> None:
        self.line, far = _fork.Pipe()
        self.left = range(0)
        """Samples that it has not answered for."""
        ours = [*others, self.line]  # a copy there would keep it alive when this process is gone
        self._process = _fork.Process(target=_work, args=(index, far, ours), daemon=True)
        with forking():
            self._process.start()
        far.close()

    def take(self, chunk: range) -> None:
        self.left = chunk
        self.line.send(chunk)

    def end(self) -> str:
        """Stop it where it still runs; how it ended."""
        self.line.close()
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"status {code}"


def _work(index: ImageIndex, line: Connection, others: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: this process's parent ends it
    for other in others:
        other.close()
    torch.set_num_threads(1)
    try:
        while True:
            for sample in line.recv():
                line.send(_fault(index, sample))
    except (EOFError, OSError):  # nobody listens any more
        return


def _fault(index: ImageIndex, sample: int) -> str:
    try:
        decode_sample(index, sample, index.read(sample))
    except (OSError, DecodeError) as error:
        return str(error) or type(error).__name__
    return ""
