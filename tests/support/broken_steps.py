"""Breaks the loss or the gradient of some steps on one rank, and tells what the steps changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

NAN, INF = float("nan"), float("inf")
#: What becomes of a loss: itself not a number; its gradient only; infinite, with its own gradient.
KINDS = {
    "loss": lambda loss: loss * NAN,
    "gradient": lambda loss: loss.register_hook(lambda g: g * NAN) and loss,
    "infinite": lambda loss: loss + INF,
}


class Breaking:
    """``job``: {kind, rank, micro_steps}, or None."""

    def __init__(self, job: dict[str, Any] | None, rank: int) -> None:
        self._job, self._rank, self._micro_step = job, rank, -1

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of the next micro-step."""
        self._micro_step += 1
        job = self._job
        if job is None or self._rank != job["rank"] or self._micro_step not in job["micro_steps"]:
            return loss
        return KINDS[job["kind"]](loss)

    def record(self, loop: Any, record: dict[str, Any]) -> None:
        """After every step: the verdict of each rank, and the digest of all that it keeps."""
        advance = loop.advance
        record["bad"], record["kept"] = [], []

        def recording() -> Any:
            result = advance()
            mine = [bool(result.update.bad), digest(kept(loop.setup))]
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
            for name, values in zip(("bad", "kept"), zip(*everyone, strict=True), strict=True):
                record[name].append(list(values))
            return result

        loop.advance = recording


def kept(setup: Any) -> Iterable[torch.Tensor]:
    """Weights, masters, moments, buffers and target, as they lie on this rank."""
    engine, stage = setup.engine.inner, setup.engine.stage
    yield from (getattr(p, "ds_tensor", p) for p in engine.module.parameters())
    yield from engine.module.buffers()
    inner = engine.optimizer.optimizer if stage else engine.optimizer
    for state in inner.state.values():
        yield from (x for x in state.values() if torch.is_tensor(x))
    if stage in (1, 2):
        yield from engine.optimizer.single_partition_of_fp32_groups
    elif stage == 3:
        yield from engine.optimizer.fp32_partitioned_groups_flat
    yield from setup.state.target.parameters()


def digest(tensors: Iterable[torch.Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
