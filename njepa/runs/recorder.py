"""What rank 0 alone writes: metrics, progress, words, summary. Silent on every other rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from njepa.config import RunConfig
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

    def begin(self, step: int, total_steps: int) -> None:
        """The run begins, after ``step`` of its steps."""
        if self._folder is not None:
            self._folder.begin()
            self._tracker = Tracker(
                self._folder.path,
                step,
                total_steps,
                tensorboard=self._run.tensorboard,
                progress=self._run.progress,
                board=open_board(self._run.tracker, self._folder.path, self._folder.config),
            )

    def lines(self) -> list[dict[str, Any]]:
        """Those of metrics.jsonl so far; none off rank 0."""
        if self._folder is None:
            return []
        metrics = self._folder.path / "metrics.jsonl"
        return [json.loads(line) for line in metrics.read_text().splitlines()]

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

        Returns:
            The summary; None off rank 0.
        """
        if self._folder is None or self._tracker is None:
            return None
        self._tracker.end_bar()
        summary = summarise(self.lines())
        self._folder.write_summary(summary)
        self.say(summary_table(summary))
        self.say(f"all numbers are in {self._folder.path / 'summary.json'}")
        return summary

    def close(self) -> None:
        """Close the files and release the folder; may be called twice."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        if self._folder is not None:
            self._folder.close()
