"""Tables with intervals, plots and docs/evidence.md, from what the cache holds."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evidence.cache import FOLDER, ROOT, Task, load
from bench.evidence.tables import BASE, IJEPA, RECIPE, TABLES, Arm, Table

DOCUMENT = ROOT / "docs" / "evidence.md"
PLOTS = ROOT / "docs" / "evidence"
_WIDTH = 110
#: Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Mean:
    """Mean over seeds with half the width of its 95 % interval (None with fewer than two)."""

    value: float
    half: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.value:.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")

    @property
    def signed(self) -> str:
        return f"{self.value:+.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")


def mean(values: Sequence[float]) -> Mean | None:
    """Student's interval: mean ± t(n − 1) s / √n; None of no values."""
    n = len(values)
    if n == 0:
        return None
    middle = statistics.fmean(values)
    if n == 1:
        return Mean(middle, None, n)
    t = _T95[min(n - 1, len(_T95)) - 1]  # beyond the list slightly too wide
    return Mean(middle, t * statistics.stdev(values) / math.sqrt(n), n)


def verdict(difference: Mean | None) -> str:
    """better or worse where the interval of the paired difference excludes 0."""
    if difference is None or difference.half is None:
        return "undecided"
    if abs(difference.value) <= difference.half:
        return "undecided"
    return "better" if difference.value > 0 else "worse"


@dataclass(frozen=True)
class Row:
    """An arm over the seeds."""

    arm: Arm
    records: dict[int, dict[str, Any]]
    """By seed: the finished runs."""
    errors: dict[int, str]
    """By seed: the failed ones."""

    def scores(self, name: str) -> dict[int, float]:
        found = {seed: r["scores"].get(name, r.get(name)) for seed, r in self.records.items()}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def mean(self, name: str) -> Mean | None:
        return mean(list(self.scores(name).values()))

    def against(self, other: Row, name: str) -> Mean | None:
        """Difference to another arm, paired by seed."""
        mine, theirs = self.scores(name), other.scores(name)
        return mean([mine[seed] - theirs[seed] for seed in mine if seed in theirs])


def rows_of(table: Table, seeds: Sequence[int], folder: Path = FOLDER) -> list[Row]:
    rows = []
    for arm in table.arms:
        found = {s: load(Task(arm.name, {**table.base, **arm.overrides}, s), folder) for s in seeds}
        rows.append(
            Row(
                arm,
                {s: r for s, r in found.items() if r and r["status"] == "done"},
                {s: r["error"] for s, r in found.items() if r and r["status"] == "failed"},
            )
        )
    return rows


def floors(seeds: Sequence[int], folder: Path = FOLDER) -> Row:
    """The untrained network and raw pixels."""
    arm = Arm("untrained", IJEPA)
    found = {s: load(Task(arm.name, arm.overrides, s, floors=True), folder) for s in seeds}
    return Row(arm, {s: r for s, r in found.items() if r and r["status"] == "done"}, {})


def markdown(table: Table, rows: Sequence[Row], floor: Row, seeds: Sequence[int]) -> str:
    """The table with its baseline, differences, mechanical verdicts, floors and failures."""
    baseline = next(row for row in rows if row.arm.name == table.baseline)
    lines = [
        "| arm | kNN | linear | kNN, difference | linear, difference | kNN / linear "
        "| feature std | RankMe | s a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        n = len(row.records)
        name = row.arm.name if n == len(seeds) else f"{row.arm.name} ({n} of {len(seeds)} seeds)"
        if row is baseline:
            differences = ["", "", "baseline"]
        else:
            knn, linear = (row.against(baseline, k) for k in ("knn_top1", "linear_top1"))
            differences = [
                *(d.signed if d else "–" for d in (knn, linear)),
                f"{verdict(knn)} / {verdict(linear)}",
            ]
        seconds = [sum(r["seconds"].values()) for r in row.records.values()]
        cells = [
            name,
            *(str(row.mean(k) or "–") for k in ("knn_top1", "linear_top1")),
            *differences,
            *(f"{m.value:.3g}" if (m := row.mean(k)) else "–" for k in ("feature_std", "rankme")),
            f"{statistics.fmean(seconds):.0f}" if seconds else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for name, knn_key, linear_key in (
        ("untrained", "knn_top1_init", "linear_top1_init"),
        ("raw pixels", "knn_top1_pixels", None),
    ):
        linear_floor = floor.mean(linear_key) if linear_key else None
        cells = [name, str(floor.mean(knn_key) or "–"), str(linear_floor or "–")]
        lines.append("| " + " | ".join([*cells, *[""] * 6]) + " |")
    failures = [
        f"Failed: {row.arm.name}, seed {seed}: {error}"
        for row in rows
        for seed, error in row.errors.items()
    ]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def plot(table: Table, rows: Sequence[Row], floor: Row, path: Path) -> None:
    """kNN of every run with the arm's interval, and the curves of feature std and clean loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.36 * max(5, len(rows))), dpi=72, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])
    colours = [f"C{i}" for i in range(len(rows))]
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        values = list(row.scores("knn_top1").values())
        left.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, markersize=5)
        if (m := row.mean("knn_top1")) is not None:
            left.errorbar(m.value, place, xerr=m.half, fmt="|", color=colour, capsize=3)
        for axis, name in ((middle, "feature_std"), (right, "loss_clean")):
            steps, curve = mean_curve(row, name)
            axis.plot(steps, curve, color=colour, linewidth=1.2)
    for key, label, side in (
        ("knn_top1_init", "untrained ", "right"),
        ("knn_top1_pixels", " pixels", "left"),
    ):
        if (m := floor.mean(key)) is not None:
            left.axvline(m.value, color="grey", linestyle=":", linewidth=1)
            left.text(m.value, -0.6, label, fontsize=7, color="grey", ha=side)
    left.set_yticks(range(len(rows)), [textwrap.fill(r.arm.name, 24) for r in rows], fontsize=8)
    for label, colour in zip(left.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    left.set_ylim(len(rows) - 0.5, -0.8)
    left.set_xlabel("kNN top-1, %")
    for axis, title in ((middle, "feature std (training)"), (right, "clean loss")):
        axis.set_xlabel("step")
        axis.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def mean_curve(row: Row, name: str) -> tuple[list[int], list[float]]:
    """A column of the curves, averaged over the seeds that have it (``loss`` for a run without a
    part of its own for the clean loss)."""
    curves = [r["curve"] for r in row.records.values()]
    column = name if all(name in c for c in curves) else "loss"
    kept = [(c["step"], c[column]) for c in curves if None not in c[column]]
    if not kept:
        return [], []
    return kept[0][0], [statistics.fmean(v) for v in zip(*(c for _, c in kept), strict=True)]


def document(tables: Sequence[Table], seeds: Sequence[int], folder: Path = FOLDER) -> str:
    """docs/evidence.md."""
    floor = floors(seeds, folder)
    parts = [
        "# Evidence: the papers' ablations, small",
        _fill(
            "Written by `python -m bench.evidence`; its results are in `bench/results/evidence`, "
            "one file per run. Change the text in `bench/evidence/tables.py`, not here."
        ),
        _fill(
            f"**What was run.** Recipe `{RECIPE}` on the embedded images: the last table whole, "
            f"the others its first {BASE['run.max_steps']} steps with batches of "
            f"{BASE['ds.train_micro_batch_size_per_gpu']}. "
            "Sigma is .25, half of the published value, because the recipe halves the "
            "positions. One thread a run, fp32 on a CPU, seeds "
            f"{', '.join(map(str, seeds))}. Scores are top-1 in % of the mean-pooled target "
            "encoder on 2,048 test images: kNN (k = 20) and a linear probe. ± is half of the 95 % "
            "interval over seeds by Student's t. Differences are to the table's baseline, paired "
            "by seed; an arm is *better* or *worse* if the interval of the difference excludes 0, "
            "else *undecided*. The verdicts are not corrected for multiple comparisons: of twenty "
            "true ties one is expected to look decided. Feature std and RankMe are those of the "
            "last 512 training images. The *valley* is the first phase of a run, in which "
            "the features shrink (docs/small-scale.md). A tiny network, a few minutes, an easy "
            "set: this says what happens here, not on ImageNet."
        ),
    ]
    for table in tables:
        rows = rows_of(table, seeds, folder)
        records = [r for row in rows for r in row.records.values()]
        parts.append(f"## {table.title}")
        parts.append(_fill(f"**Published.** {table.paper}"))
        command = f"python -m bench.evidence {table.name}"
        if not records and not any(row.errors for row in rows):
            parts.append(f"Not measured yet: `{command}`.")
            continue
        parts.append(_fill(f"**Verdict.** {table.verdict or 'Not written yet.'}"))
        if records:
            parts.append(f"![{table.title}](evidence/{table.name}.png)")
        parts.append(markdown(table, rows, floor, seeds))
        if records:
            parts.append(_fill(f"`{command}`; {_origin(records)}."))
    return "\n\n".join(parts) + "\n"


def _origin(records: Sequence[dict[str, Any]]) -> str:
    machines = {
        f"{r['machine']['device']}, {r['machine']['threads']} thread a run, "
        f"torch {r['machine']['torch']}"
        for r in records
    }
    steps = sorted({r["settings"]["run.max_steps"] for r in records})
    dates = sorted({r["date"] for r in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{' and '.join(map(str, steps))} steps; {'; '.join(sorted(machines))}; {when}"


def _fill(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def write(seeds: Sequence[int], plotted: Sequence[Table] = TABLES) -> list[Path]:
    """docs/evidence.md, and the plots of the tables that have results."""
    paths = []
    floor = floors(seeds)
    for table in plotted:
        rows = rows_of(table, seeds)
        if any(row.records for row in rows):
            paths.append(PLOTS / f"{table.name}.png")
            plot(table, rows, floor, paths[-1])
    DOCUMENT.write_text(document(TABLES, seeds), encoding="utf-8")
    return [*paths, DOCUMENT]
