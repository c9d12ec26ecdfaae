"""CPU threads of a rank: its share of the cores, so that ranks do not wait for each other's cores.

Threads of OpenMP wait for each other at the end of every operator, spinning. With more of them than
cores, an operator lasts until the operating system has given each of them its turn.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from njepa.choice import Choice

#: What a user or a launcher sets (torchrun sets the first to 1); it stays as it is.
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def set_threads(control: dist.ProcessGroup | None) -> Choice:
    """Give torch's operators their threads, and say why that many. Collective.

    Torch takes all cores for each process. Here the ranks that may run on the same cores share
    them; cores that a launcher bound to one rank alone are its own.

    Args:
        control: of all ranks, on the host; None for a single process.
    """
    cores = os.sched_getaffinity(0)
    sharing = 1
    if control is not None:
        own = (socket.gethostname(), sorted(cores))
        places = [own] * control.size()
        dist.all_gather_object(places, own, group=control)
        sharing = sum(host == own[0] and not cores.isdisjoint(its) for host, its in places)
    given = [f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)]
    if given:
        return Choice(str(torch.get_num_threads()), ", ".join(given))
    threads, reason = share(torch.get_num_threads(), len(cores), quota(), sharing)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return Choice(str(threads), reason)


def share(default: int, cores: int, quota: int | None, sharing: int) -> tuple[int, str]:
    """Threads of one of ``sharing`` ranks, at least one, and the reason.

    Args:
        default: what torch would take, at most one a core.
        cores: that the rank may run on.
        quota: of the container, in cores; None: no limit.
    """
    available, what = min(default, cores), f"of {cores} cores"
    if quota is not None and quota < available:
        available, what = quota, f"of {quota} cores, the container's limit"
    if sharing > 1:
        what += f" that {sharing} ranks share"
    return max(1, available // sharing), what


def quota(file: Path = _QUOTA) -> int | None:
    """Whole cores that the container may use, rounded up; None: no limit, or none that is told."""
    try:
        limit, period = file.read_text().split()
        return None if limit == "max" else -(-int(limit) // int(period))
    except (OSError, ValueError):
        return None
