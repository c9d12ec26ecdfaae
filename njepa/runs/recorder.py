"""What rank 0 alone writes: metrics, progress, words, summary. Silent on every other rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from njepa.config import ConfigError, RunConfig
from njepa.runs.folder import RunFolder
from njepa.runs.summary import summary_table
from njepa.runs.trackers import open_board
from njepa.runs.tracking import Tracker

#: Makes numbers; called on rank 0 only, because making them may cost a wait for the device.
Numbers = Callable[[], dict[str, Any]]


class Recorder:
    """Every rank calls it alike; without a folder, that is off rank 0, nothing happens."""

    def __init__(self, folder: RunFolder | None, run: RunConfig) -> None:
        self._folder, self._run = folder, run
        self._tracker: Tracker | None = None
        self.unwritten: str | None = None
        """Why there is no summary, for people, where there should be one."""

    def begin(self, step: int, total_steps: int) -> None:
        """The run begins, after ``step`` of its steps.

        Raises:
            ConfigError: its folder cannot be written.
        """
        if self._folder is None:
            return
        path = self._folder.path
        with _writable(path):
            self._folder.begin()
        board = open_board(self._run.tracker, path, self._folder.config)
        with _writable(path):
            self._tracker = Tracker(
                path,
                step,
                total_steps,
                tensorboard=self._run.tensorboard,
                progress=self._run.progress,
                board=board,
            )

    def lines(self) -> list[dict[str, Any]]:
        """Those of metrics.jsonl so far, written or not; none off rank 0."""
        if self._tracker is None:
            return []
        return [json.loads(line) for line in self._tracker.lines()]

    def say(self, text: str) -> None:
        """Print for the person who watches."""
        if self._tracker is not None:
            self._tracker.say(text)

    def advance(self) -> None:
        """One more step is done."""
        if self._tracker is not None:
            self._tracker.advance()

    def log(self, step: int, numbers: Numbers) -> None:
        """Write a line of metrics.jsonl, unless there are no numbers."""
        if self._tracker is not None and (values := numbers()):
            self._tracker.log(step, values)

    def finish(self, summarise: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Any:
        """Write the summary that ``summarise`` makes of the lines of metrics.jsonl.

        Where the disk does not take it, ``unwritten`` says so.

        Returns:
            The summary; None off rank 0.
        """
        if self._folder is None or self._tracker is None:
            return None
        self._tracker.end_bar()
        summary = summarise(self.lines())
        file = self._folder.path / "summary.json"
        try:
            self._folder.write_summary(summary)
        except OSError as error:
            self.unwritten = f"{file} cannot be written: {error}"
        self.say(summary_table(summary))
        if self.unwritten is None:
            self.say(f"all numbers are in {file}")
        return summary

    def close(self) -> None:
        """Close the files and release the folder; may be called twice."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        if self._folder is not None:
            self._folder.close()


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder} cannot be written: {error}; make room, or choose another run.dir"
        ) from None
