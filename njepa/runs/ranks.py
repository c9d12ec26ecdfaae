"""Who am I among the processes of this run, and on which device.

The same file runs under ``deepspeed``, ``torchrun``, ``srun`` and plain ``python``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from njepa.choice import Choice
from njepa.config import ConfigError
from njepa.runs.peers import Watch
from njepa.runs.threads import set_threads

T = TypeVar("T")

_BACKSTOP = timedelta(hours=24)  # of a collective: the watch over the ranks finds hangs
_watches: list[Watch] = []  # of this process, while it is one of several ranks


class RanksMissing(RuntimeError):
    """Not all ranks of the run came together."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process in the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None
    """Gloo group for words between hosts (stop flags, errors); None for a single process."""
    threads: Choice = field(
        default_factory=lambda: Choice(str(torch.get_num_threads()), "as they were")
    )
    """Of torch's operators on the CPU."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Group of the tensors, None for a single process."""
        return dist.group.WORLD if self.world > 1 else None

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def sum(self, value: int) -> int:
        """Sum of a host integer over all ranks."""
        if self.control is None:
            return value
        total = torch.tensor([value])
        dist.all_reduce(total, group=self.control)
        return int(total)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on all ranks."""
        if self.control is None:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 and give its result to all; its error is raised on all."""
        if self.control is None:
            return action()
        box: list[object] = [None, None]
        if self.main:
            try:
                box[0] = action()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.control)
        if isinstance(box[1], Exception):
            raise box[1]
        return box[0]  # type: ignore[return-value]


def join_ranks(device: str = "auto", timeout_s: float = 1800) -> Ranks:
    """Start torch.distributed from the launcher's environment (a world of one without it).

    Sets the process's share of CPU threads, too. Several ranks watch each other from here on
    (``njepa.runs.peers``), until ``leave_ranks``.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout_s: ``run.timeout_s``.

    Raises:
        ConfigError: CUDA was asked for and there is none.
        RanksMissing: the others did not come within ``timeout_s``.
    """
    _read_launcher()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device=cuda, but torch sees no CUDA device; set run.device=cpu or auto"
        )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by DeepSpeed when it is first imported
    if not dist.is_initialized():
        store = _meet(rank, world, timeout_s)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=_BACKSTOP,
            store=store,
            rank=rank,
            world_size=world,
        )
    control: dist.ProcessGroup | None = None
    if world > 1:
        control = cast(dist.ProcessGroup, dist.new_group(timeout=_BACKSTOP, backend="gloo"))
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Ranks(rank, world, local_rank, place, control, set_threads(control))


def _meet(rank: int, world: int, timeout_s: float) -> Any:
    """Where the ranks leave their addresses; the watch begins."""
    if world == 1:
        # No port: two runs of one rank on one machine never collide.
        return dist.HashStore()  # type: ignore[attr-defined]
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        limit = timedelta(seconds=timeout_s)
        store, _, _ = next(rendezvous("env://", rank, world, timeout=limit))
        _watches.append(Watch(store, rank, world, timeout_s))
    except (dist.DistError, OSError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"rank {rank} found {address} in use, perhaps by another run on this machine; give "
                f"the launcher another port: --master_port {int(os.environ['MASTER_PORT']) + 1}"
            ) from None
        raise RanksMissing(
            f"rank {rank} did not meet all {world} ranks at {address} within "
            f"run.timeout_s={timeout_s:g} s: {error}. Look at the output of the other ranks, and "
            f"start all of them with the same command"
        ) from None
    return store


def _read_launcher() -> None:
    """Fill torch.distributed's variables where the launcher did not (plain python, srun)."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        if env.get("SLURM_NTASKS_PER_NODE", "").isdecimal():
            env["LOCAL_WORLD_SIZE"] = env["SLURM_NTASKS_PER_NODE"]
        if "MASTER_ADDR" not in env:
            if "SLURM_LAUNCH_NODE_IPADDR" not in env:
                raise ConfigError(
                    "started by srun without MASTER_ADDR; export MASTER_ADDR=<first node>"
                )
            env["MASTER_ADDR"] = env["SLURM_LAUNCH_NODE_IPADDR"]
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if env["WORLD_SIZE"] != "1" and missing:
        raise ConfigError(
            f"WORLD_SIZE={env['WORLD_SIZE']} without {' and '.join(missing)}; start the ranks with "
            f"deepspeed or torchrun, or export where rank 0 listens"
        )


def leave_ranks(error: BaseException | None = None) -> None:
    """Close the process group, so that no launcher complains about leaked resources.

    Args:
        error: why this rank ends alone; the others are told. What a collective raises because
            another rank has ended is not told: the process ends here, as that rank's watch says.
    """
    while _watches:
        told = "" if error is None else f"{type(error).__name__}: {error}"
        echo = type(error) is RuntimeError or isinstance(error, dist.DistError)
        _watches.pop().leave(told, echo)
    if dist.is_initialized():
        dist.destroy_process_group()
