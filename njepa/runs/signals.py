"""Ctrl-C and SIGTERM as a request to stop after the current step, agreed on by all ranks."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

from njepa.runs.place import waiting
from njepa.runs.ranks import Ranks


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; a second Ctrl-C ends the process at once.

    Launchers send SIGTERM after the terminal's SIGINT, so only repeated SIGINTs mean haste.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._owner = os.getpid()
        self._signal = 0
        self._interrupts = 0
        self._vote: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a loader process: the training process decides
            return
        self._signal = number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; call once a step on every rank.

        With several ranks the answer is that of the step before: the vote travels while the step
        computes, so nobody waits for it, and all ranks stop after the same step.
        """
        if self._ranks.control is None:
            return self._signal != 0
        answer = False
        if self._work is not None and self._vote is not None:
            with waiting():
                self._work.wait()
            answer = bool(self._vote.item())
        self._vote = torch.tensor([self._signal])
        self._work = dist.all_reduce(
            self._vote, op=dist.ReduceOp.MAX, group=self._ranks.control, async_op=True
        )
        return answer

    def close(self) -> None:
        if self._work is not None:
            with waiting():
                self._work.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
