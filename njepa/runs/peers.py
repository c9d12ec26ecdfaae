"""A watch over the ranks: one that dies, falls silent or stands still ends all of them, by name.

A thread of each process tells rank 0 every second where its main thread is; the thread of rank
0 judges and tells all. What a collective does on a lost peer depends on its library: gloo raises,
NCCL waits. So this uses sockets of its own and asks neither.

- Its process is gone: the system closes its connection, and all end at once.
- Silent for ``run.timeout_s``: a stopped process, a lost host or network.
- Standing still: the main threads of *all* ranks have been at one place for ``run.timeout_s``.
  While one of them moves, such as rank 0 in an evaluation, those that wait for it are in order. To
  blame are those that do not wait for others, at the lowest step.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from njepa.runs.place import here, look, waiting

#: Exit status of a process that ends because of another rank, or is itself the one that hangs.
STATUS = 3
_GRACE = 5.0  # seconds in which other ranks may end by the same error on their own
_LONGEST = 1 << 16  # bytes of a message
_GONE = "its process is gone: killed, crashed, or out of memory"


@dataclass
class Peer:
    """What is known of a rank."""

    rank: int
    heard: float
    """When it last said something."""
    name: str = "has not said a word"
    step: int = 0
    phase: str = "starting"
    still: float = 0.0
    """Seconds since its main thread moved."""
    waits: bool = False
    at: str = ""
    ended: str | None = None
    """Why it has ended; empty: as it should."""
    ended_at: float = 0.0

    def told(self) -> str:
        """Who it is and where it was."""
        return f"rank {self.rank} ({self.name}), last in step {self.step}, {self.phase},"


class Verdict(NamedTuple):
    ranks: list[int]
    """To blame."""
    text: str


def judge(
    peers: Mapping[int, Peer],
    now: float,
    timeout: float,
    everybody: bool = True,
    grace: float = _GRACE,
) -> Verdict | None:
    """Why the run is to end; None: it is not.

    Args:
        peers: by rank.
        now: as ``Peer.heard``, in seconds.
        everybody: these are all ranks, so a hang can be seen, too.
        grace: seconds that the others get to end by themselves after an error of one.
    """
    for peer in peers.values():
        if peer.ended and now - peer.ended_at >= grace:
            return Verdict([peer.rank], f"{peer.told()} ended: {peer.ended}")
        if peer.ended is None and now - peer.heard >= timeout:
            return Verdict(
                [peer.rank],
                f"{peer.told()} has been silent for {now - peer.heard:.0f} s: its process is "
                f"stopped, or its host or the network is gone",
            )
    running = [peer for peer in peers.values() if peer.ended is None]
    ending = any(peer.ended for peer in peers.values())
    if not everybody or ending or not running or any(p.still < timeout for p in running):
        return None
    idle = [peer for peer in running if not peer.waits]
    if not idle:
        left = [str(peer.rank) for peer in peers.values() if peer.ended == ""]
        done = f" (rank {', '.join(left)} had ended before)" if left else ""
        return Verdict([p.rank for p in running], f"all ranks wait for each other{done}: "
                       + "; ".join(f"{p.told()} in {p.at}" for p in running))  # fmt: skip
    blamed = [peer for peer in idle if peer.step == min(p.step for p in idle)]
    text = "; ".join(f"{p.told()} has not moved for {p.still:.0f} s, in {p.at}" for p in blamed)
    return Verdict([peer.rank for peer in blamed], text)


class Watch:
    """The watch of one process; it begins at once.

    Args:
        store: of torch.distributed, of all ranks; rank 0 leaves there how to reach it.
        timeout_s: ``run.timeout_s``.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout_s: float) -> None:
        self._rank, self._world, self._timeout = rank, world, timeout_s
        self._interval = max(0.1, min(1.0, timeout_s / 20))
        now = time.monotonic()
        self._turn, self._next, self._moved = now, now, now
        self._place: tuple[object, ...] = ()
        self._links: dict[int, _Link] = {}
        self._leaving: str | None = None
        self._echo = False
        self._selector = selectors.DefaultSelector()
        self._waker, wakened = socket.socketpair()
        self._sockets = [self._waker, wakened]
        self._selector.register(wakened, selectors.EVENT_READ, lambda: wakened.recv(1))
        if rank == 0:
            self._peers = {n: Peer(n, now) for n in range(world)}
            self._token = secrets.token_hex(16)
            server = _listen(world)
            self._sockets.append(server)
            self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server))
            store.set("njepa/watch", json.dumps([server.getsockname()[1], self._token]))
        else:
            self._peers = {0: Peer(0, now)}
            port, self._token = json.loads(store.get("njepa/watch"))
            address = (os.environ["MASTER_ADDR"], port)
            self._add(_Link(socket.create_connection(address, timeout_s)))
        # A loader's process would hold the connections open after this one has died.
        os.register_at_fork(after_in_child=self._forget)
        self._beat(now)  # from here on rank 0 knows who it is that dies
        self._thread = threading.Thread(target=self._run, name="njepa-watch", daemon=True)
        self._thread.start()

    def leave(self, error: str = "", echo: bool = False) -> None:
        """Say goodbye; may be called twice.

        Args:
            error: why this rank ends, where it should not; the others then end, too.
            echo: the error may come from another rank's end. What is known of that is waited for,
                and then this process ends here; rank 0 is the first to say that it is its own.
        """
        if echo:
            self._echo = True
            with waiting():
                self._thread.join(2 * _GRACE if self._rank else _GRACE)
        if self._leaving is None:
            self._leaving = error[:2000]
            with suppress(OSError):
                self._waker.send(b".")
        self._thread.join(_GRACE)

    def _run(self) -> None:
        # Neither torch nor a lock that a forked process could inherit: no ``at_work`` is needed.
        while self._leaving is None:
            for key, _ in self._selector.select(self._interval):
                key.data()
            now = time.monotonic()
            if now - self._turn > self._timeout / 2:  # this process was stopped, or the host slept
                self._moved = now
                for peer in self._peers.values():
                    peer.heard = now
            self._turn = now
            if now >= self._next:
                self._next = now + self._interval
                self._beat(now)
            grace = 0.0 if self._echo else _GRACE
            verdict = judge(self._peers, now, self._timeout, self._rank == 0, grace)
            if verdict is not None:
                self._end(verdict)
        self._beat(time.monotonic())
        self._send({"end": self._leaving})
        _finish(self._links.values())
        self._forget()

    def _beat(self, now: float) -> None:
        """Say where the main thread is."""
        seen = look()
        if seen.place != self._place:
            self._place, self._moved = seen.place, now
        host = f"host {socket.gethostname()}, pid {os.getpid()}"
        message = {"rank": self._rank, "name": host, "step": here.step, "phase": here.phase,
                   "still": now - self._moved, "waits": seen.waits, "at": seen.at}  # fmt: skip
        self._send({"token": self._token, **message})
        if self._rank == 0:
            self._take(0, message)

    def _send(self, message: dict[str, Any]) -> None:
        for link in self._links.values():
            link.send(message)

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            self._add(_Link(server.accept()[0]))

    def _add(self, link: _Link) -> None:
        self._sockets.append(link.socket)
        if self._rank:
            link.rank, self._links[0] = 0, link
        self._selector.register(link.socket, selectors.EVENT_READ, lambda: self._read(link))

    def _read(self, link: _Link) -> None:
        """What came over a connection; one that does not know the token is closed."""
        messages, still_open = link.read()
        for message in messages:
            if link.rank is None and message.get("token") == self._token:
                link.rank = int(message["rank"])
                self._links[link.rank] = link
            if link.rank is not None:
                self._take(link.rank, message)
        if not still_open or (messages and link.rank is None):
            self._selector.unregister(link.socket)
            link.socket.close()
            peer = self._peers.get(-1 if link.rank is None else link.rank)
            if peer is not None and peer.ended is None:
                peer.ended, peer.ended_at = _GONE, time.monotonic() - _GRACE

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        peer = self._peers[rank]
        peer.heard = time.monotonic()
        if "verdict" in message:
            self._end(Verdict(*message["verdict"]))
        if "end" in message:
            peer.ended, peer.ended_at = message["end"], peer.heard
        else:
            for key in ("name", "step", "phase", "still", "waits", "at"):
                setattr(peer, key, message[key])

    def _end(self, verdict: Verdict) -> None:
        """Say why, and end this process: its main thread may never come back."""
        if self._rank == 0:
            self._send({"verdict": verdict})

        def tell() -> None:
            way_out = here.way_out()
            os.write(2, f"njepa: {verdict.text}. This is rank {self._rank}, in step {here.step}; "
                        f"all ranks end{way_out and '; '}{way_out}\n".encode())  # fmt: skip
            if self._rank in verdict.ranks:
                faulthandler.dump_traceback(2)
            sys.stdout.flush()

        _within(_GRACE, tell)  # the disk or the terminal may hang, too
        _finish(self._links.values())
        os._exit(STATUS)

    def _forget(self) -> None:
        self._selector.close()
        for each in self._sockets:
            each.close()


class _Link:
    """JSON lines over a socket, without ever waiting."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket, self._rest = connected, b""
        self._whole = True  # no message was cut by a full buffer
        self.rank: int | None = None
        """Of the other end, once it has given the token."""

    def send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with suppress(OSError):  # who does not listen is found silent
            if self._whole:
                self._whole = self.socket.send(line) == len(line)

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Whole messages, and whether the other end is still there."""
        try:
            got = self.socket.recv(_LONGEST)
        except BlockingIOError:
            return [], True
        except OSError:
            return [], False
        *lines, self._rest = (self._rest + got).split(b"\n")
        try:
            messages = [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return [], False
        return messages, bool(got) and len(self._rest) < _LONGEST


def _listen(backlog: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=both)
    server.setblocking(False)
    return server


def _finish(links: Iterable[_Link]) -> None:
    """Let the last message arrive: closing with unread bytes would take it back."""
    deadline = time.monotonic() + 1
    for link in links:
        with suppress(OSError):
            link.socket.shutdown(socket.SHUT_WR)
    for link in links:
        with suppress(OSError):
            link.socket.settimeout(max(0.01, deadline - time.monotonic()))
            while link.socket.recv(_LONGEST):
                pass
        link.socket.close()


def _within(seconds: float, action: Callable[[], None]) -> None:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
