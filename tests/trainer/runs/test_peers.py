"""The watch over the ranks: what it concludes, and what strangers can do to it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest

from njepa.runs import place
from njepa.runs.peers import STATUS, Peer, judge
from njepa.runs.place import Place, look, moved, phase, waiting
from tests.support import program_env

NOW, TIMEOUT = 1000.0, 30.0


def peer(rank: int, **known) -> Peer:
    values = {"heard": NOW - 1, "name": "host a, pid 7", "step": 5, "phase": "training"} | known
    return Peer(rank, at="wait (threading, line 1)", **values)


def verdict(*peers: Peer, everybody: bool = True):
    return judge({p.rank: p for p in peers}, NOW, TIMEOUT, everybody)


def test_a_silent_rank_is_named():
    assert verdict(peer(0), peer(1, heard=NOW - 29)) is None
    found = verdict(peer(0), peer(1, heard=NOW - 31))
    assert found.ranks == [1]
    assert (
        "rank 1 (host a, pid 7), last in step 5, training, has been silent for 31 s" in found.text
    )


def test_a_rank_that_does_not_wait_for_others_hangs():
    still = {"still": 31.0}
    found = verdict(peer(0, waits=True, **still), peer(1, **still), peer(2, waits=True, **still))
    assert found.ranks == [1]
    assert "has not moved for 31 s, in wait (threading, line 1)" in found.text


def test_of_several_the_one_at_the_lowest_step_hangs():
    """Another one, ahead of it, may wait on the GPU for what this one has not sent."""
    assert verdict(peer(0, still=31, step=6), peer(1, still=31)).ranks == [1]


def test_while_one_rank_moves_the_others_may_wait():
    assert verdict(peer(0, phase="evaluating"), peer(1, still=999, waits=True)) is None


def test_what_is_known_of_one_rank_alone_shows_no_hang():
    assert verdict(peer(0, still=999)) is not None
    assert verdict(peer(0, still=999), everybody=False) is None


def test_ranks_that_all_wait_are_a_deadlock():
    found = verdict(peer(0, still=31, waits=True), peer(1, ended=""), peer(2, still=31, waits=True))
    assert found.ranks == [0, 2]
    assert "all ranks wait for each other (rank 1 had ended before)" in found.text


def test_an_error_is_told_unless_the_others_end_by_it_in_time():
    assert verdict(peer(0), peer(1, ended="DataError: x", ended_at=NOW - 1)) is None
    found = verdict(peer(0), peer(1, ended="DataError: x", ended_at=NOW - 9))
    assert "rank 1 (host a, pid 7), last in step 5, training, ended: DataError: x" in found.text
    assert verdict(peer(0), peer(1, ended="")) is None


def looks(between=lambda: None):
    """Two looks at this thread, which waits at one place for both."""
    found = []

    def watch() -> None:
        time.sleep(0.2)  # the main thread has reached ``join``
        found.append(look())
        between()
        found.append(look())

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    return found


def test_a_look_at_the_main_thread(monkeypatch):
    monkeypatch.setattr(place, "here", Place())
    first, second = looks()
    assert first == second
    assert first.at.startswith("_wait_for_tstate_lock (threading, line ")
    assert not first.waits
    first, second = looks(moved)
    assert first.place != second.place
    with phase("evaluating"):
        assert place.here.phase == "evaluating"
    assert place.here.phase == "starting"
    with waiting():
        assert all(seen.waits for seen in looks())


def test_a_loop_that_is_always_at_one_line_moves():
    """As an evaluation that spends its time in one call."""
    found, done = [], threading.Event()

    def watch() -> None:
        for _ in range(5):
            time.sleep(0.05)
            found.append(look())
        done.set()

    threading.Thread(target=watch).start()
    while not done.is_set():
        time.sleep(0.001)
    assert len({seen.place for seen in found}) == 5


RANKS = """
import os, signal, sys, time, torch, torch.distributed as dist
from njepa.runs.ranks import join_ranks, leave_ranks
ranks = join_ranks("cpu", 2)
{strangers}
if ranks.rank == 1:
    {then}
ranks.barrier()
leave_ranks()
print("done")
"""
STRANGERS = """
import json, socket
from njepa.runs import ranks as module
port = module._watches[0]._sockets[2].getsockname()[1] if ranks.main else 0
port = ranks.gather(port)[0]
for words in (b"x" * 100_000, b'{"token": "guess", "rank": 1}\\n', b"[1]\\n", b"\\xff\\n", b""):
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(words)
        stranger.settimeout(5)
        if words:
            try:
                assert stranger.recv(9) == b"", words
            except ConnectionError:
                pass
"""


def run_ranks(then: str, strangers: str = "") -> list[tuple[int, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    code = RANKS.format(then=then, strangers=strangers)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=program_env(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, CUDA_VISIBLE_DEVICES=""),
        )
        for rank in range(2)
    ]  # fmt: skip
    return [(process.communicate(timeout=120)[0], process.returncode)[::-1] for process in started]


@pytest.mark.slow
@pytest.mark.multirank
def test_who_does_not_know_the_token_is_not_heard():
    ended = run_ranks("time.sleep(0.5)", STRANGERS)
    assert [(status, said.splitlines()[-1]) for status, said in ended] == [(0, "done")] * 2, ended


@pytest.mark.slow
@pytest.mark.multirank
def test_a_worker_that_outlives_its_rank_does_not_hide_its_death():
    """A forked process holds all connections of its parent open."""
    ended = run_ranks(
        "if not os.fork(): os.close(1); os.close(2); time.sleep(10); os._exit(0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert ended[0][0] == STATUS
    assert "its process is gone" in ended[0][1]
