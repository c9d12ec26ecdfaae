"""SIGTERM, SIGUSR1 and Ctrl-C as a request to save and stop, with a limit on the time it takes."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

#: Exit statuses, also in docs/cli.md: stopped as asked; stopped, but the last steps are lost.
STOPPED, STEPS_LOST = 75, 76
INTERRUPTED = 128 + signal.SIGINT

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_BY_OTHERS, _CLOSE = 0, 255  # no signals


class Stopped(Exception):
    """The training ended because it was asked to; ``run.resume=true`` continues it."""


class StopSignals:
    """Listens from construction to ``close``; only the main thread may make one.

    The first signal sets ``asked``; the training then saves and ends by itself. A thread ends the
    process where that takes over ``grace_s`` seconds, and at once at a second Ctrl-C: launchers
    send SIGTERM after the terminal's SIGINT, so only repeated SIGINTs mean haste. The interpreter
    writes a signal's number into a pipe the moment that it comes, and the thread reads it. So it
    acts while the main thread computes, where a handler in Python would have to wait.

    Args:
        grace_s: seconds from the first signal to the end.

    Attributes:
        lost: what would be lost if the process ended now, for people; None: nothing.
    """

    def __init__(self, grace_s: float) -> None:
        self.lost: Callable[[], str | None] = lambda: None
        self._grace, self._asked = grace_s, threading.Event()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _left_to_thread) for number in ASKING}
        self._thread = threading.Thread(target=self._listen, name="njepa-signals", daemon=True)
        self._thread.start()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def ask(self) -> None:
        """As a signal: another rank got one."""
        if not self.asked:
            self._asked.set()
            os.write(self._writer, bytes([_BY_OTHERS]))

    def close(self) -> None:
        """Restore what the signals did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._writer, bytes([_CLOSE]))
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listen(self) -> None:
        end: float | None = None
        interrupts = 0
        while True:
            left = None if end is None else max(end - time.monotonic(), 0)
            if not select.select([self._reader], [], [], left)[0]:
                self._give_up()
            for number in os.read(self._reader, 64):
                if number == _CLOSE:
                    return
                if number != _BY_OTHERS and number not in ASKING:
                    continue  # another handler's
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    _end(INTERRUPTED, "interrupted again: ended without a checkpoint")
                if end is None:
                    end = time.monotonic() + self._grace
                    self._asked.set()
                    self._announce(number)

    def _announce(self, number: int) -> None:
        env = os.environ
        if number != _BY_OTHERS and env.get("RANK", env.get("SLURM_PROCID", "0")) == "0":
            again = ", a second Ctrl-C ends at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            _say(f"{name}: saving and stopping, in {self._grace:g} s at most{again}")

    def _give_up(self) -> None:
        limit = f"not done {self._grace:g} s after being asked to stop (run.grace_s)"
        try:
            lost = self.lost()
        except OSError as error:
            lost = f"what is saved cannot be read: {error}"
        if lost is None:
            _end(STOPPED, f"{limit}; no step is lost, run.resume=true continues")
        else:
            _end(STEPS_LOST, f"{limit}; {lost}")


def _left_to_thread(number: int, frame: FrameType | None) -> None:
    """Python writes into the pipe for signals with a handler only."""


def _end(status: int, text: str) -> None:
    """Without Python's own end, which would wait for the main thread."""
    env = os.environ
    rank = f"rank {env['RANK']}: " if int(env.get("WORLD_SIZE", "1")) > 1 else ""
    _say(rank + text)
    os._exit(status)


def _say(text: str) -> None:
    """Without a lock, which the main thread or a child that is forked now could hold for ever."""
    with suppress(OSError):  # nobody reads
        os.write(2, f"njepa: {text}\n".encode())


@contextmanager
def unheard_by_children() -> Iterator[None]:
    """Around a fork: the child starts with the signals blocked, and none is lost here.

    A terminal or a launcher signals a whole process group. Unblocked, a child would write into the
    pipe of its parent.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
