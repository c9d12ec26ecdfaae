"""What a scan has done so far, in a file that outlives its process."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from types import TracebackType

from njepa.config import ConfigError

logger = logging.getLogger(__name__)


class ScanJournal:
    """``.NAME.scan`` beside the list ``NAME``: the source, then a line for each chunk that is done.

    A line that a crash has cut, and what follows it, does not count. A journal of another source
    (or of one that has changed) is begun again.

    Args:
        out: the list; None: nothing is kept.
        source: what the source is now, one line.

    Attributes:
        done: numbers of chunks with their bad samples and the reasons.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, out: Path | None, source: str) -> None:
        self.done: dict[int, dict[int, str]] = {}
        self._path = None if out is None else out.with_name(f".{out.name}.scan")
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        head, kept = json.dumps({"source": source}) + "\n", 0
        with self._path.open("ab+") as file:
            file.seek(0)
            if file.readline() == head.encode():
                kept = file.tell()
                for line in file:
                    if not self._take(line):
                        break
                    kept += len(line)
        self._file = self._path.open("r+b", buffering=0)
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            try:
                self._write(head.encode())
            except OSError:
                self._file.close()
                self.remove()
                raise
        self._empty = not self.done
        if self.done:
            logger.warning("%s: the interrupted scan goes on", self._path)

    def add(self, chunk: int, bad: dict[int, str]) -> None:
        """A chunk is done; it stays so if the process is killed now.

        Raises:
            ConfigError: it cannot be written; what was written before stays.
        """
        if self._path is None:
            return
        try:
            self._write(json.dumps([chunk, list(bad.items())]).encode() + b"\n")
        except OSError as error:
            raise ConfigError(
                f"scan: {self._path} cannot be written: {error.strerror}; make room, and the same "
                f"command goes on where it was"
            ) from None
        self._empty = False

    def remove(self) -> None:
        """The scan is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> ScanJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._path is not None:
            self._file.close()
            if self._empty:
                self.remove()

    def _write(self, line: bytes) -> None:
        """The line, or nothing of it."""
        end = self._file.tell()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(end)
            raise

    def _take(self, line: bytes) -> bool:
        if not line.endswith(b"\n"):
            return False
        try:
            chunk, bad = json.loads(line)
            self.done[int(chunk)] = {int(i): str(why) for i, why in bad}
        except (ValueError, TypeError):
            return False
        return True
