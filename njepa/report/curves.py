"""The curves of the page: which numbers share a chart, and their points for every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from njepa.report.record import RunRecord, number

#: Points of a run at most; longer ones are averaged over neighbouring lines.
POINTS = 600


@dataclass(frozen=True)
class Chart:
    """A chart: its title, the unit of its axis, its keys in metrics.jsonl with their names."""

    title: str
    unit: str
    keys: dict[str, str]
    log: bool = False
    scale: float = 1.0
    sparse: bool = False
    """Few points: dots are drawn."""
    span: float = 0.0
    """What the axis covers at least: no mountains of noise."""


CHARTS = (
    Chart("Loss", "what is minimised", {"loss": "total"}),
    Chart(
        "Prediction losses", "smooth-L1, unweighted",
        {"loss_clean": "clean", "loss_noise": "noised"},
    ),
    Chart("Consistency", "squared difference", {"loss_consistency": "noised − clean"}, log=True),
    Chart("VICReg, invariance", "unweighted", {"vicreg_inv": "invariance"}, log=True),
    Chart("VICReg, variance hinge", "unweighted", {"vicreg_std": "variance"}),
    Chart("VICReg, covariance", "unweighted", {"vicreg_cov": "covariance"}),
    Chart("RankMe", "dimensions in use", {"rankme": "target encoder"}),
    Chart("Feature std", "over images", {"feature_std": "target encoder"}),
    Chart("Feature cosine", "between images", {"feature_cosine": "target encoder"}),
    Chart(
        "kNN while training", "top-1, %",
        {"knn_top1": "kNN", "knn_top1_context": "kNN, context encoder"}, sparse=True, span=10,
    ),
    Chart(
        "Online probes", "top-1, %",
        {"online_linear_top1": "linear", "online_knn_top1": "kNN"}, span=10,
    ),
    Chart("Gradient norm", "before clipping", {"grad_norm": "last step"}, log=True),
    Chart("Learning rate", "AdamW", {"lr": "learning rate"}),
    Chart("Weight decay", "AdamW", {"wd": "weight decay"}),
    Chart("EMA momentum", "target encoder", {"ema": "momentum"}),
    Chart("Speed", "images/s, all ranks", {"images_per_s": "images/s"}),
    Chart("Waiting for images", "% of the time", {"data_wait_frac": "wait"}, scale=100, span=1),
    Chart("Model FLOPs utilisation", "%", {"mfu": "MFU"}, scale=100),
    Chart("Tokens", "patches", {"k_context": "context", "k_target": "a target block"}),
    Chart(
        "Context beyond the shortest", "% of the patches", {"context_cut_frac": "share"},
        scale=100,
    ),
    Chart("Skipped steps", "since the line before", {"bad_steps": "not finite"}, sparse=True),
)  # fmt: skip
#: Not drawn: the axis, its double, intervals.
_NOT_DRAWN = {"step", "epoch", "compilations"}


def charts(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The charts that have points, in the form that ``report.js`` draws.

    ``x``: steps of all runs together; ``series``: ``{run, label, part, y}`` with a null where the
    run has no point there.
    """
    known = {key for chart in CHARTS for key in chart.keys}
    others = {key for run in runs for line in run.lines for key in line} - known - _NOT_DRAWN
    extra = [Chart(key, "", {key: key}) for key in sorted(map(str, others))]
    thinned = [_thinned(run.lines) + _at_the_end(run) for run in runs]
    found = (_chart(chart, runs, thinned) for chart in (*CHARTS, *extra))
    return [chart for chart in found if chart is not None]


def _chart(
    chart: Chart, runs: Sequence[RunRecord], lines: Sequence[list[dict[str, Any]]]
) -> dict[str, Any] | None:
    series: list[tuple[dict[str, Any], dict[int, float]]] = []
    for r, run in enumerate(runs):
        for part, (key, label) in enumerate(chart.keys.items()):
            points = {
                line["step"]: chart.scale * value
                for line in lines[r]
                if (value := number(line.get(key))) is not None
            }
            if points:
                several = len(chart.keys) > 1
                name = label if len(runs) == 1 else run.name + f", {label}" * several
                series.append(({"run": r, "part": part, "label": name}, points))
    if not series:
        return None
    x = sorted({step for _, points in series for step in points})
    least = min(value for _, points in series for value in points.values())
    most = max(value for _, points in series for value in points.values())
    return {
        "title": chart.title,
        "unit": chart.unit,
        # A logarithm only where it is needed and there is one.
        "log": chart.log and least > 0 and most > 20 * least,
        "dots": chart.sparse or len(x) < 12,
        "span": chart.span,
        "x": x,
        "series": [
            what | {"y": [_rounded(points.get(step)) for step in x]} for what, points in series
        ],
    }


def _at_the_end(run: RunRecord) -> list[dict[str, Any]]:
    """The scores of the summary as the last points of curves that there are (``eval.every``)."""
    curves = {key for line in run.lines for key in line if key.startswith("knn_top1")}
    scores = {key: run.summary[key] for key in sorted(curves & set(run.summary))}
    return [{"step": run.last_step, **scores}] if scores else []


def _rounded(value: float | None) -> float | None:
    """Six digits: what a chart can show."""
    return None if value is None else float(f"{value:.6g}")


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of neighbouring lines as one with the means of their numbers, at their last step."""
    group = -(-len(lines) // POINTS)
    if group <= 1:
        return lines
    return [_mean(lines[i : i + group]) for i in range(0, len(lines), group)]


def _mean(lines: list[dict[str, Any]]) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for line in lines:
        for key, raw in line.items():
            if (value := number(raw)) is not None:
                values.setdefault(key, []).append(value)
    means: dict[str, Any] = {key: sum(found) / len(found) for key, found in values.items()}
    return means | {"step": lines[-1]["step"]}
