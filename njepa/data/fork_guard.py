"""Worker processes are forked only while no thread of a loader is at work.

A forked process inherits every lock of its parent as it was and only the forking thread: a lock
that another thread held is never released there. One such lock is glibc's around the exit handlers.
A thread holds it when torch registers a static object on the first use of an op, and a worker
takes it on its way into torch (``torch.set_num_threads`` starts with such an object).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_turn = threading.Condition()
_at_work = 0  # threads inside of ``at_work``
_forkers = 0  # threads that wait in ``forking``; no other work begins meanwhile


@contextmanager
def at_work() -> Iterator[None]:
    """Around what a thread does while another may fork; any number of threads, but not nested."""
    global _at_work
    with _turn:
        _turn.wait_for(lambda: not _forkers)
        _at_work += 1
    try:
        yield
    finally:
        with _turn:
            _at_work -= 1
            _turn.notify_all()


@contextmanager
def forking() -> Iterator[None]:
    """Around a fork: waits for the work that has begun and holds up what would begin."""
    global _forkers
    with _turn:
        _forkers += 1
        try:
            _turn.wait_for(lambda: not _at_work)
            yield
        finally:
            _forkers -= 1
            _turn.notify_all()
