"""How much memory is free for a rank, and how much there is at all."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import torch

from njepa.runs.ranks import Ranks

_CONTAINER = Path("/sys/fs/cgroup")


def free_memory(ranks: Ranks) -> float:
    """Bytes of the GPU, or this rank's share of its host's memory; the least of all ranks.

    Collective. A container's limit counts.
    """
    if ranks.on_gpu:
        return float(min(ranks.gather(torch.cuda.mem_get_info(ranks.device)[0])))
    return _share(ranks, host_memory())


def all_memory(ranks: Ranks) -> float:
    """As ``free_memory``, if this training were alone and a host also used all of its swap."""
    if ranks.on_gpu:
        return float(min(ranks.gather(torch.cuda.mem_get_info(ranks.device)[1])))
    return _share(ranks, all_host_memory())


def _share(ranks: Ranks, memory: int) -> float:
    places = ranks.gather((socket.gethostname(), memory))
    return min(here / sum(other == host for other, _ in places) for host, here in places)


def all_host_memory(container: Path = _CONTAINER) -> int:
    """Bytes of memory and swap, whoever uses them."""
    memory, swap = (1024 * _number(Path("/proc/meminfo"), f"{n}Total:") for n in ("Mem", "Swap"))
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        memory = min(memory, int((container / "memory.max").read_text()))
    return memory + swap


def host_memory(container: Path = _CONTAINER) -> int:
    """Bytes that new processes can have without swapping."""
    free = 1024 * _number(Path("/proc/meminfo"), "MemAvailable:")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int((container / f"memory.{n}").read_text()) for n in ("max", "current"))
        free = min(free, limit - used + _number(container / "memory.stat", "inactive_file"))
    return free


def _number(file: Path, name: str) -> int:
    found = re.search(rf"^{name}\s+(\d+)", file.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
