"""Whether the features of a run live: the limits, the judgement of a curve, and the alarm.

The limits were chosen on measured runs, of which some collapsed (docs/report.md, The verdict).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from njepa.runs.ranks import Ranks

#: ``feature_std`` as a share of its largest value in the run, ``rankme`` and ``feature_cosine``:
#: beyond one of them the features are collapsed, or are close to it.
COLLAPSED_STD, COLLAPSED_RANK, COLLAPSED_COSINE = 0.1, 3.0, 0.999
LOW_STD, LOW_RANK, HIGH_COSINE = 0.2, 5.0, 0.997
#: How much the last value must exceed that of a quarter of the run earlier to count as growing.
GROWTH = 1.1
#: Steps in which nothing need have happened yet.
EARLY = 100
#: Log lines in a row that the alarm waits for.
LASTING = 3

ADVICE = (
    "almost every image gets the same features. Raise the first value of optim.ema, lower "
    "optim.lr, lengthen optim.warmup_epochs or take method=cjepa, in a new run.dir "
    "(docs/trouble.md, Collapse)"
)


class Collapsed(RuntimeError):
    """The features collapsed, and ``run.on_collapse=stop`` ends such a run; it can be resumed."""


class Features(NamedTuple):
    """The numbers of a log line on the features of the target encoder (``FeatureMonitor``)."""

    step: float
    std: float
    rank: float
    cosine: float | None
    """None: a run of a version that did not measure it."""


class Judgement(NamedTuple):
    """A run up to one of its log lines."""

    share: float
    """Of the standard deviation, of its largest value in the run."""
    rank_share: float
    """Of the effective rank, of its largest value in the run."""
    collapsed: bool
    low: bool
    """Close to it."""
    growing: bool
    """Standard deviation and rank both exceed those of a quarter of the run earlier."""

    @property
    def bad(self) -> bool:
        return self.collapsed or (self.low and not self.growing)


class FeatureCurve:
    """The log lines of a run so far."""

    def __init__(self) -> None:
        self.lines: list[Features] = []
        self._std = self._rank = 1e-30

    def add(self, line: Features) -> Judgement:
        """Take the next line and judge the run by all of them."""
        self.lines.append(line)
        self._std, self._rank = max(self._std, line.std), max(self._rank, line.rank)
        share, cosine = line.std / self._std, line.cosine or 0.0
        return Judgement(
            share,
            line.rank / self._rank,
            share < COLLAPSED_STD or line.rank < COLLAPSED_RANK or cosine > COLLAPSED_COSINE,
            share < LOW_STD or line.rank < LOW_RANK or cosine > HIGH_COSINE,
            self._growing(line),
        )

    def _growing(self, line: Features) -> bool:
        earlier = bisect_right(self.lines, 0.75 * line.step, key=lambda seen: seen.step)
        if not earlier:
            return False
        before = self.lines[earlier - 1]
        return line.std > GROWTH * before.std and line.rank > GROWTH * before.rank


class CollapseAlarm:
    """Rings once for each collapse; rank 0 sees the numbers, all ranks learn the answer.

    It rings where the judgement was bad in ``LASTING`` log lines in a row after the first ``EARLY``
    steps, and again only after features that are not ``low``. A valley that small models go through
    and leave does not reach the limits (docs/small-scale.md).

    Args:
        mode: ``run.on_collapse``.
        lines: of metrics.jsonl so far. With ``stop`` a run that was collapsed then rings anew.
    """

    def __init__(
        self, mode: Literal["warn", "stop", "off"], lines: Iterable[Mapping[str, Any]]
    ) -> None:
        self._mode, self._curve = mode, FeatureCurve()
        self._judged: Judgement | None = None
        self._bad, self._rung = 0, False
        for line in lines:
            self.see(line["step"], line)
            self._ring()
        self._rung = self._rung and mode != "stop"

    def see(self, step: int, numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take the numbers of a log line, and give them back."""
        std, rank, cosine = (numbers.get(k) for k in ("feature_std", "rankme", "feature_cosine"))
        if std is not None and rank is not None:
            judged = self._curve.add(Features(step, std, rank, cosine))
            self._bad = self._bad + 1 if judged.bad and step >= EARLY else 0
            self._rung = self._rung and judged.low
            self._judged = judged
        return numbers

    def rings(self, ranks: Ranks) -> str | None:
        """What is to be said of the features, the same on all ranks; None: nothing. Collective."""
        return None if self._mode == "off" else ranks.on_main(self._ring)

    def _ring(self) -> str | None:
        if self._rung or self._bad < LASTING or self._judged is None:
            return None
        self._rung, line = True, self._curve.lines[-1]
        cosine = "" if line.cosine is None else f", feature_cosine {line.cosine:.4f}"
        return (
            f"the features collapse at step {line.step:.0f}: feature_std {line.std:.3g} "
            f"({100 * self._judged.share:.0f} % of the largest in this run), rankme "
            f"{line.rank:.1f}{cosine}, for {self._bad} log lines: {ADVICE}"
        )
