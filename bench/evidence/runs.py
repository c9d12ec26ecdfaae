"""Run what is missing, several side by side; finished runs are kept, failed ones run again."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path

from bench.evidence.cache import FOLDER, ROOT, Task, finished, load, save

WORK = ROOT / "runs" / "evidence"


class _Worker:
    """A process of ``worker.serve`` and the task it is at."""

    def __init__(self, number: int, folder: Path, work: Path) -> None:
        from bench.evidence.worker import serve

        context = multiprocessing.get_context("spawn")
        self.number = number
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, folder, work, number), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the end of the process closes the pipe
        self.task: Task | None = None
        self.began = 0.0

    def give(self, task: Task) -> None:
        self.task, self.began = task, time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # it died: ``answer`` says so
            self.pipe.send(task)

    def answer(self) -> str | None:
        """None, or why the task failed; call when the pipe is readable."""
        try:
            error: str | None = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            error = f"its process ended with exit code {self.process.exitcode}"
        return error

    def end(self) -> None:
        """At once: a run that is cut leaves nothing in the cache."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def sweep(
    tasks: Sequence[Task],
    jobs: int = 2,
    folder: Path = FOLDER,
    work: Path = WORK,
    say: Callable[[str], None] = print,
) -> list[Task]:
    """Run those of ``tasks`` that have no result yet, in order; returns those that failed.

    Raises:
        RuntimeError: another sweep works in ``work``.
    """
    waiting = deque(task for task in tasks if not finished(task, folder))
    total, done = len(waiting), 0
    work_done, work_left = 0, sum(_cost(task) for task in waiting)
    say(f"{len(tasks)} runs, {len(tasks) - total} of them known, {total} to do")
    if not waiting:
        return []
    failed: list[Task] = []
    began = time.perf_counter()
    with _alone(work):
        workers = [_Worker(n, folder, work) for n in range(min(jobs, total))]
        try:
            for worker in workers:
                worker.give(waiting.popleft())
            while busy := {w.pipe: w for w in workers if w.task is not None}:
                for pipe in wait(list(busy)):
                    assert isinstance(pipe, Connection)
                    worker = busy[pipe]
                    task, error = worker.task, worker.answer()
                    assert task is not None
                    worker.task, done = None, done + 1
                    if error is not None:
                        failed.append(task)
                        day = f"{datetime.now(UTC):%Y-%m-%d}"
                        save(task, {"status": "failed", "error": error, "date": day}, folder)
                    work_done, work_left = work_done + _cost(task), work_left - _cost(task)
                    left = (time.perf_counter() - began) / work_done * work_left
                    seconds = time.perf_counter() - worker.began
                    say(
                        f"[{done:3d}/{total}] {task.name}, seed {task.seed}: "
                        f"{_outcome(task, error, folder)}, {seconds:.0f} s; "
                        f"about {left / 60:.0f} min left"
                    )
                    if not waiting:
                        continue
                    if not worker.process.is_alive():
                        worker.end()
                        workers[workers.index(worker)] = worker = _Worker(
                            worker.number, folder, work
                        )
                    worker.give(waiting.popleft())
        finally:
            for worker in workers:
                worker.end()
    return failed


def _cost(task: Task) -> int:
    """What a run takes, in images; an evaluation takes about as long as 3,000 in training."""
    return 3000 + task.steps * int(task.ds["train_micro_batch_size_per_gpu"])


def _outcome(task: Task, error: str | None, folder: Path) -> str:
    if error is not None:
        return f"FAILED ({error})"
    record = load(task, folder)
    assert record is not None
    scores = record["scores"]
    end = "_init" if task.floors else ""
    return f"kNN {scores[f'knn_top1{end}']:.1f}, linear {scores[f'linear_top1{end}']:.1f}"


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Nobody else runs here; what a killed sweep left is removed."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another sweep works in {work}; wait for it") from None
        for old in work.iterdir():
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            elif old.suffix == ".log":
                old.unlink()
        yield
