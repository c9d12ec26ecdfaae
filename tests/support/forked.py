"""Ranks of ``njepa train``, forked from a process that has imported torch and DeepSpeed.

A start then takes a second and not ten. Nothing imported here starts a thread.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path


def prepare() -> None:
    """Import what takes long, once."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import deepspeed  # noqa: F401

    import njepa.training.loop  # noqa: F401


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fork_rank(
    rank: int,
    world: int,
    port: int,
    arguments: list[str],
    log: Path,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Start a rank, in a process group of its own; returns its process id.

    Args:
        before: called in it, before the training.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()  # a kill reaches the loader's processes, too
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        sizes = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({key: str(value) for key, value in (place | sizes).items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        from njepa import train

        before()
        status = train.main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
