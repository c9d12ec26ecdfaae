"""A stop that one rank was asked for, agreed on by all."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from njepa.runs.place import waiting
from njepa.runs.ranks import Ranks
from njepa.runs.signals import Stopped, StopSignals

P = ParamSpec("P")
T = TypeVar("T")


class StopRequest:
    """Whether to stop; without ``signals`` nobody asks."""

    def __init__(self, ranks: Ranks, signals: StopSignals | None) -> None:
        self._ranks, self._signals = ranks, signals
        self._vote: torch.Tensor | None = None
        self._work: dist.Work | None = None

    @property
    def asked(self) -> bool:
        """Of this rank."""
        return self._signals is not None and self._signals.asked

    def agreed_now(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return self._noted(any(self._ranks.gather(self.asked)))

    def agreed(self) -> bool:
        """As ``agreed_now``, for every step: nobody waits.

        With several ranks the answer is that of the step before: the vote travels while the step
        computes, and all ranks stop after the same step.
        """
        if self._ranks.control is None:
            return self.asked
        answer = False
        if self._work is not None and self._vote is not None:
            with waiting():
                self._work.wait()
            answer = bool(self._vote.item())
        self._vote = torch.tensor([int(self.asked)])
        self._work = dist.all_reduce(
            self._vote, op=dist.ReduceOp.MAX, group=self._ranks.control, async_op=True
        )
        return self._noted(answer)

    def until_asked(self, action: Callable[P, T]) -> Callable[P, T]:
        """``action``, but ``Stopped`` where this rank was asked to stop before it."""

        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            if self.asked:
                raise Stopped
            return action(*args, **kwargs)

        return checked

    def close(self) -> None:
        if self._work is not None:
            with waiting():
                self._work.wait()

    def _noted(self, answer: bool) -> bool:
        """The time of this rank runs, too."""
        if answer and self._signals is not None:
            self._signals.ask()
        return answer
