"""Writes checkpoints beside the training: whole, on the disk, verified, or not at all.

A thread of each rank copies what it holds to CPU memory (``Snapshot``), while the next step runs
forward and backward, and writes it into ``.step-00001200.tmp``. Only the next update waits for the
copy (``await_copy``). The threads agree through files: each leaves a note of what it wrote; that of
rank 0 waits for all notes, writes the index, renames the folder and removes old ones. Collectives
stay on the main thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from njepa.data.fork_guard import at_work
from njepa.runs.checkpoint_files import STATE, TARGET, shard_name, write_index
from njepa.runs.checkpoints import all_checkpoints, checkpoint_step, latest_checkpoint
from njepa.runs.kept import keep_checkpoint
from njepa.runs.ranks import Ranks
from njepa.runs.snapshot import Piece, Snapshot, Written, sync_folder, write_file

log = logging.getLogger(__name__)

_POLL = 0.05  # seconds between two looks for the notes of the other ranks
_DIED = "its thread ended by an error"
_PATIENCE = 60.0  # seconds for the other ranks, where the run ends by an error


class CheckpointFailed(RuntimeError):
    """The last checkpoint of a run could not be written; the one before it is whole."""


@dataclass
class _Job:
    """A checkpoint in work."""

    step: int
    folder: Path
    state: str
    pieces: list[Piece]
    target: list[Piece]
    """Of rank 0."""
    after: torch.cuda.Event | None
    """The step before on the GPU."""
    copied: threading.Event = field(default_factory=threading.Event)
    wrote: threading.Event = field(default_factory=threading.Event)
    """This rank has done its own part, or could not."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Rank 0 waits for nobody any more."""
    own: str | None = _DIED
    """Why this rank's part was not written; None: it was."""
    outcome: str | None = _DIED
    """Rank 0: why there is no checkpoint; None: there is one."""


class CheckpointWriter:
    """Saves a run; at most one checkpoint is in work.

    A save that fails (full disk, quota, read-only, lost permission) is a warning, and the next one
    tries again: the training goes on, because the disk can be mended while it does, and stopping
    would lose the same steps for certain. Only after the last save there is no next one.

    Args:
        run: the run folder.
        keep: newest checkpoints that stay.
        keep_every: those of multiples of so many steps stay, too.
        grace_s: ``run.grace_s``; the first save that takes longer is a warning.
    """

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        keep: int,
        keep_every: int | None = None,
        grace_s: float = math.inf,
    ) -> None:
        self._run, self._root, self._ranks = run, run / "checkpoints", ranks
        self._keep, self._keep_every, self._grace = keep, keep_every, grace_s
        self._shard, self._target = Snapshot(), Snapshot()
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._failed: str | None = None

    @property
    def nbytes(self) -> int:
        """CPU memory of the snapshots on this rank."""
        return self._shard.nbytes + self._target.nbytes

    def save(
        self,
        step: int,
        pieces: Iterable[Piece],
        target: Mapping[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        """Begin to copy and write the state after ``step`` steps. Collective.

        Waits for the checkpoint before, where that is still in work. The values may change after
        ``await_copy``.

        Args:
            pieces: what this rank writes of weights and moments.
            target: all tensors of the target encoder; rank 0 writes them.
            state: JSON values that describe the run.
        """
        began = time.perf_counter()
        if self._settle() and (waited := time.perf_counter() - began) > 1:
            log.warning(
                "step %d waited %.1f s for the checkpoint before it: the disk is slower than "
                "run.checkpoint_every asks",
                step,
                waited,
            )
        folder = self._root / f".step-{step:08d}.tmp"
        facts = json.dumps({"step": step, "world": self._ranks.world, **state}, indent=2) + "\n"

        def prepare() -> None:
            for left in (*self._root.glob(".step-*.tmp"), *self._root.glob(".step-*.old")):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            folder.mkdir(parents=True)

        self._failed = None
        try:
            self._ranks.on_main(prepare)
        except OSError as error:
            self._failed = self._fail(step, str(error), error.errno)
            return
        listed = [Piece(name, t.view(-1), 0, tuple(t.shape)) for name, t in target.items()]
        self._job = _Job(
            step,
            folder,
            facts,
            list(pieces),
            listed if self._ranks.main else [],
            torch.cuda.current_stream().record_event() if self._ranks.on_gpu else None,
        )
        self._thread = threading.Thread(
            target=self._work, args=(self._job,), name="njepa-checkpoint", daemon=True
        )
        self._thread.start()

    def await_copy(self) -> None:
        """Wait until the values of the checkpoint in work may change: before every update."""
        if self._job is not None:
            self._job.copied.wait()

    def finish(self) -> None:
        """Wait for the checkpoint in work. Collective.

        Raises:
            CheckpointFailed: the last one could not be written.
        """
        self._settle()
        if self._failed is not None:
            raise CheckpointFailed(self._failed)

    def close(self) -> None:
        """As ``finish``, but alone and without an error: other ranks may be gone."""
        if self._job is not None and self._thread is not None:
            self._job.wrote.wait()
            self._thread.join(_PATIENCE)
            self.abandon()
            self._thread.join()

    def abandon(self) -> None:
        """Wait for nobody any more: what is in work need not become a checkpoint."""
        if self._job is not None:
            self._job.abandoned.set()
            self._job = None

    def _settle(self) -> bool:
        """Wait for the one in work, if any, and learn alike on all ranks how it ended."""
        job, thread = self._job, self._thread
        if job is None or thread is None:
            return False
        job.wrote.wait()
        failed = [f"rank {n}: {why}" for n, why in enumerate(self._ranks.gather(job.own)) if why]
        if failed:
            job.abandoned.set()

        def ended() -> str | None:
            thread.join()
            if job.outcome == _DIED:
                job.outcome = self._fail(job.step, _DIED, None)
            if job.outcome is not None and failed:  # what the thread could not know
                return f"{job.outcome} ({failed[0]})"
            return job.outcome

        self._failed, self._job = self._ranks.on_main(ended), None
        return True

    def _work(self, job: _Job) -> None:
        began = time.perf_counter()
        try:
            self._copy(job)
            self._write(job)
            job.own = None
            job.wrote.set()
            if self._ranks.main:
                self._complete(job)
                self._compare_with_grace(job.step, time.perf_counter() - began)
            job.outcome = None
        except OSError as error:
            if job.own is not None:
                job.own = str(error)
            if self._ranks.main:
                job.outcome = self._fail(job.step, str(error), error.errno)
                shutil.rmtree(job.folder, ignore_errors=True)  # a full disk needs the room
            else:
                self._note_failure(job, str(error))
        finally:
            job.copied.set()
            job.wrote.set()

    def _compare_with_grace(self, step: int, seconds: float) -> None:
        if seconds > self._grace:
            log.warning(
                "the checkpoint of step %d took %.1f s, more than run.grace_s=%g: a stop by a "
                "signal would lose steps; raise run.grace_s, and the time that the scheduler waits",
                step,
                seconds,
                self._grace,
            )
            self._grace = math.inf  # once

    def _copy(self, job: _Job) -> None:
        with at_work():  # torch holds locks
            self._shard.take(job.pieces, job.after)
            self._target.take(job.target, job.after)
        job.copied.set()
        job.pieces, job.target = [], []

    def _write(self, job: _Job) -> None:
        """This rank's part, and a note of it."""
        name = shard_name(self._ranks.rank)
        written = {name: self._shard.write(job.folder / name)}
        if self._ranks.main:
            written[TARGET] = self._target.write(job.folder / TARGET)
            written[STATE] = write_file(job.folder / STATE, job.state)
        note = {"files": written, "pieces": {name: self._shard.pieces}}
        unfinished = job.folder / f".{name}.tmp"
        write_file(unfinished, json.dumps(note))
        os.rename(unfinished, job.folder / f".{name}.note")

    def _note_failure(self, job: _Job, text: str) -> None:
        """For rank 0, where that can still be written; else it learns of it at the next save."""
        with contextlib.suppress(OSError):
            name = f".{shard_name(self._ranks.rank)}.failed"
            (job.folder / name).write_text(f"rank {self._ranks.rank}: {text}")

    def _complete(self, job: _Job) -> None:
        """Rank 0: all parts are one checkpoint; older ones may go."""
        files, pieces = dict[str, Written](), dict[str, Iterable[Any]]()
        for rank in range(self._ranks.world):
            note = self._await_note(job, rank)
            files |= {name: Written(*written) for name, written in note["files"].items()}
            pieces |= note["pieces"]
        write_index(job.folder, files, pieces)
        for note_file in job.folder.glob(".*"):
            note_file.unlink()
        sync_folder(job.folder)
        final = self._root / f"step-{job.step:08d}"
        if final.exists():
            self._remove(final)
        os.rename(job.folder, final)
        sync_folder(self._root)
        try:
            for path in all_checkpoints(self._run)[: -self._keep]:
                if not self._keep_every or checkpoint_step(path) % self._keep_every:
                    self._remove(path)
        except OSError as error:  # the new one is whole
            log.warning("an old checkpoint cannot be removed: %s", error)

    def _await_note(self, job: _Job, rank: int) -> dict[str, Any]:
        name = shard_name(rank)
        while True:
            for failed in job.folder.glob(".*.failed"):
                raise OSError(failed.read_text())
            if (job.folder / f".{name}.note").is_file():
                found: dict[str, Any] = json.loads((job.folder / f".{name}.note").read_text())
                return found
            if job.abandoned.wait(_POLL):
                raise OSError(f"rank {rank} did not write its part")

    def _remove(self, path: Path) -> None:
        """Gone at once, even where the process is killed meanwhile."""
        aside = path.with_name(f".{path.name}.old")
        os.rename(path, aside)
        shutil.rmtree(aside)

    def _fail(self, step: int, why: str, number: int | None) -> str:
        """What is to be said of a checkpoint that failed; rank 0 warns at once."""
        last = latest_checkpoint(self._run)
        hint = _HINTS.get(number or 0, "look at that disk")
        text = (
            f"the checkpoint of step {step} could not be written: {why}; {hint}. The last good one "
            f"is {last or 'none'}"
        )
        if self._ranks.main:
            log.warning("%s. Training goes on, and the next save tries again", text)
        return text


def keep_saved(writer: CheckpointWriter, run: Path, step: int, ranks: Ranks) -> str:
    """Keep the checkpoint that was saved last, of ``step``; where it is, in words. Collective."""
    try:
        writer.finish()
        saved = run / "checkpoints" / f"step-{step:08d}"
        return f"its checkpoint stays in {ranks.on_main(lambda: keep_checkpoint(run, saved))}"
    except (CheckpointFailed, OSError) as error:
        return f"its checkpoint is not kept: {error}"


_HINTS = {
    errno.ENOSPC: "free space, or lower run.keep_checkpoints",
    errno.EDQUOT: "the quota is used up: free space, or lower run.keep_checkpoints",
    errno.EFBIG: "the size of files is limited (ulimit -f)",
    errno.EROFS: "the file system is read-only: mount it for writing again",
    errno.EACCES: "give this user write permission again",
    errno.EPERM: "give this user write permission again",
}
