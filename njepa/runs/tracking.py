"""Where numbers go: metrics.jsonl, TensorBoard, the progress shown. Rank 0 only."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from njepa.atomic import write_atomically
from njepa.runs.trackers import Board, TensorBoard

log = logging.getLogger(__name__)


class Tracker:
    """Writes one JSON object per logged step.

    Args:
        run: the run folder.
        start: first step of this process; later lines of an interrupted run are dropped.
        total: steps of the whole run.
        progress: show it: a bar where stderr is a terminal, elsewhere a line per logged step.
        board: one more place for the numbers (``runs/trackers.py``).
    """

    def __init__(
        self,
        run: Path,
        start: int,
        total: int,
        *,
        tensorboard: bool = True,
        progress: bool = True,
        board: Board | None = None,
    ) -> None:
        path = self._path = run / "metrics.jsonl"
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= start]
            write_atomically(path, "".join(line + "\n" for line in lines))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in close)
        self._unwritten: list[str] = []  # what a full disk did not take
        self._boards: list[Board] = [TensorBoard(run, start)] if tensorboard else []
        self._boards += [board] if board else []
        quiet = None if progress else True  # tqdm: None is quiet where stderr is no terminal
        self._bar = tqdm(total=total, initial=start, disable=quiet, unit="step", dynamic_ncols=True)
        self._lines, self._total = progress and self._bar.disable, total
        self._first: tuple[int, float] | None = None  # of these lines: step, time

    def lines(self) -> list[str]:
        """All of metrics.jsonl, and those that it did not take yet."""
        return [*self._path.read_text().splitlines(), *self._unwritten]

    def advance(self) -> None:
        self._bar.update()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the numbers of ``step`` (optimizer steps done)."""
        self._unwritten.append(json.dumps({"step": step, **metrics}) + "\n")
        self._write()
        self._draw(step, metrics)
        if self._lines and "loss" in metrics:
            self.say(self._line(step, metrics))
        shown = {
            "loss": f"{metrics['loss']:.4f}" if "loss" in metrics else None,
            "img/s": f"{metrics['images_per_s']:.0f}" if "images_per_s" in metrics else None,
        }
        self._bar.set_postfix({k: v for k, v in shown.items() if v is not None}, refresh=False)

    def _write(self) -> None:
        """Append the lines that wait. A full disk can be emptied meanwhile: it ends no training."""
        end, lines = os.fstat(self._file.fileno()).st_size, "".join(self._unwritten).encode()
        try:
            if self._file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)  # no half line
            log.warning("%s: %s; the next line will bring this one", self._path, error)
        else:
            self._unwritten.clear()

    def _draw(self, step: int, metrics: dict[str, Any]) -> None:
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
        for board in list(self._boards):
            try:
                board.log(step, numbers)
            except Exception as error:  # a full disk, or whatever a library of others raises
                kind = type(board).__name__
                log.warning("%s's events cannot be written and end here: %r", kind, error)
                self._boards.remove(board)

    def _line(self, step: int, metrics: dict[str, Any]) -> str:
        """``step 20 of 1536: loss 0.6846, 178 images/s, 13:25 left``; the time from the second on.

        The first step holds compilation and warm-up, so the pace is that since the first line.
        """
        now = time.monotonic()
        parts = [f"loss {metrics['loss']:.4f}"]
        if "images_per_s" in metrics:
            parts.append(f"{metrics['images_per_s']:.0f} images/s")
        if self._first is None:
            self._first = step, now
        elif step < self._total:
            pace = (now - self._first[1]) / (step - self._first[0])
            parts.append(f"{tqdm.format_interval(pace * (self._total - step))} left")
        return f"step {step} of {self._total}: {', '.join(parts)}"

    def say(self, text: str) -> None:
        """Print a line without tearing the bar, and at once: a file is read while it grows."""
        tqdm.write(text)
        sys.stdout.flush()

    def end_bar(self) -> None:
        """The steps are done; what follows is printed below the bar."""
        self._bar.close()

    def close(self) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # said when they were written
            self._file.close()
        for board in self._boards:
            try:
                board.close()
            except Exception as error:  # as in _draw
                log.warning("%s was not closed: %r", type(board).__name__, error)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line cut off by a crash
        return float("inf")
