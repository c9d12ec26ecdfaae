"""The table of the op benchmarks, which goals are met, and a roofline.

    python -m bench.report [FILES] [--png ROOFLINE.png] [--goals]

Without FILES: the newest in bench/results. Every row is printed, the losing ones too. Ratios above
1 mean faster than the opponent. "% bound" is the least time over the time: a copy that moves as
many bytes as the formula must (not: as the code does), or, where that takes longer, the useful
FLOPs at the rate of a large matrix product, both measured in the same run. It can exceed 100 where
tensors stay in a cache. "x most" is how many times as fast as eager that least time is: no goal can
ask for more. Memory is the peak above the inputs, divided by eager's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import Results, newest, read

Row = dict[str, Any]
#: What "auto" takes on each kind of device, best first.
OURS = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
COLUMNS = ("op", "size", "dtype", "mode", "impl", "median", "clock", "rate", "% bound", "x eager")
COLUMNS += ("x compile", "x most", "memory")


def is_op(row: Row) -> bool:
    """Rows of bench_ops; masks, step and loader have tables of their own."""
    return "ceiling_gbps" in row


def _key(row: Row) -> tuple[str, ...]:
    return (row["op"], row["size"], row["dtype"], row["mode"])


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _flops(tera: float) -> str:
    return f"{tera:.3g} TFLOP/s" if tera >= 1.0 else f"{1e3 * tera:.3g} GFLOP/s"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def memory_ratio(row: Row, rows: Iterable[Row]) -> float | None:
    """Peak memory of a row divided by eager's; None where eager needs none or did not run."""
    for other in rows:
        if other["impl"] == "eager" and _key(other) == _key(row) and other["peak_bytes"]:
            return float(row["peak_bytes"] / other["peak_bytes"])
    return None


def most(row: Row) -> float | None:
    """How many times as fast as eager the bound is; None where eager did not run."""
    return None if row["ratio_eager"] is None else float(row["ratio_eager"] / row["fraction"])


def _best_rival(row: Row, rows: list[Row]) -> float | None:
    """The ratio to the faster of eager and compile; None where one of them did not run."""
    ratios = row["ratio_eager"], row["ratio_compile"]
    return None if None in ratios else min(ratios)


def cells(row: Row, rows: list[Row]) -> list[str]:
    rate = f"{row['gbps']:.1f} GB/s"
    if row["bound"] == "matmul":
        rate = _flops(row["tflops"])
    return [
        *_key(row),
        row["impl"],
        _seconds(row["median"]),
        str(row.get("clock", row.get("timing"))),  # the second: before 2026-11-25
        rate,
        f"{100 * row['fraction']:.0f}",
        _ratio(row["ratio_eager"]),
        _ratio(row["ratio_compile"]),
        _ratio(most(row)),
        _ratio(memory_ratio(row, rows)),
    ]


def table(lines: list[list[str]]) -> str:
    """Text on the left, numbers on the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 5 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


@dataclass(frozen=True)
class Goal:
    """Something the best of ours is to reach, in every row that ``applies``.

    ``value`` may be None: then the opponent did not run, and the goal is open.
    """

    text: str
    kind: str
    applies: Callable[[Row], bool]
    value: Callable[[Row, list[Row]], float | None]
    least: float | None = None
    most: float | None = None


def _of(*ops: str, mode: str = "fwdbwd", size: str = "") -> Callable[[Row], bool]:
    return lambda row: row["op"] in ops and row["mode"] == mode and size in row["size"]


def _field(name: str) -> Callable[[Row, list[Row]], float | None]:
    return lambda row, rows: row[name]


#: FLOPs: eager computes D x D products whole, of n x n by symmetry half are needed: 8 times fewer.
_VICREG = {"cpu": ("n256-d2048", 4.0), "cuda": ("n2048-d8192", 3.0)}


def _goals(kind: str) -> list[Goal]:
    size, times = _VICREG[kind]
    goals = [
        Goal("85 % of a copy of its size", kind, _copied, _field("fraction"), least=0.85),
        Goal("not slower than eager and compile", kind, lambda row: True, _best_rival, least=1.0),
        Goal(
            f"{times:.0f} x eager", kind, _of("vicreg", size=size), _field("ratio_eager"),
            least=times,
        ),
    ]  # fmt: skip
    if kind == "cuda":
        ops = _of("predictor_tokens", "jepa_loss")
        goals.append(Goal("half of eager's memory", kind, ops, memory_ratio, most=0.5))
    return goals


def _copied(row: Row) -> bool:
    return bool(row["bound"] == "copy")


GOALS = [goal for kind in OURS for goal in _goals(kind)]


def ours(rows: list[Row], kind: str) -> list[Row]:
    """Of every row that "auto" would run, the implementation it takes."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        rank = OURS[kind]
        if row["impl"] in rank:
            held = best.get(_key(row))
            if held is None or rank.index(row["impl"]) < rank.index(held["impl"]):
                best[_key(row)] = row
    return list(best.values())


def judge(results: Results) -> list[list[str]]:
    """One line a goal and row: op, size, dtype, mode, verdict, value, the goal."""
    rows = [row for row in results.rows if is_op(row)]
    lines = []
    for goal in GOALS:
        if goal.kind != results.kind:
            continue
        found = [row for row in ours(rows, results.kind) if goal.applies(row)]
        if not found:
            lines.append(["-", "-", "-", "-", "not run", "-", goal.text])
        for row in found:
            value = goal.value(row, rows)
            verdict = "open"
            if value is not None:
                reached = value >= goal.least if goal.least is not None else value <= goal.most
                verdict = "met" if reached else "MISSED"
            lines.append([*_key(row), verdict, _ratio(value), f"{goal.text} ({row['impl']})"])
    return lines


def describe(results: Results) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in results.versions.items() if v)
    threads = f", threads {results.threads}" if results.kind == "cpu" else ""
    head = f"{results.device}{threads}, {results.date}, {versions}"
    return "\n".join([head, *(f"  {command}" for command in results.commands)])


COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#d9822b",
    "reference": "#7b5ea7",
    "triton": "#1a7f5a",
    "native": "#1f5fbf",
}
MARKERS = "osD^vP*X"


def roofline(results: Results, path: Path) -> None:
    """One panel a dtype and mode: FLOP/s over FLOP per byte, and the two measured ceilings.

    Both axes are of the case's least traffic and useful work, the same for every implementation:
    points of one size stand above each other. Cases without FLOPs (a plain gather) have no place.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    rows = [row for row in results.rows if is_op(row) and row["flops"]]
    panels = sorted({(row["dtype"], row["mode"]) for row in rows})
    ops = sorted({row["op"] for row in rows})
    marker = dict(zip(ops, MARKERS, strict=False))
    dtypes = sorted({dtype for dtype, _ in panels})
    figure, axes = pyplot.subplots(
        len(dtypes), 2, figsize=(12, 4.6 * len(dtypes) + 0.9), squeeze=False, sharex=True
    )
    for axis, (dtype, mode) in zip(
        axes.flat, [(d, m) for d in dtypes for m in ("fwd", "fwdbwd")], strict=True
    ):
        here = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
        if not here:
            axis.set_axis_off()
            continue
        gbps, tflops = here[0]["ceiling_gbps"], here[0]["ceiling_tflops"]
        intensity = [row["flops"] / row["bytes"] for row in rows]
        low, high = min(intensity) / 2, max(max(intensity) * 2, 2e3 * tflops / gbps)
        ridge = 1e3 * tflops / gbps
        title = f"{dtype}, {mode}: copy {gbps:.4g} GB/s, product {_flops(tflops)}"
        axis.plot([low, ridge], [low * gbps, ridge * gbps], color="black", lw=1.2)
        axis.plot([ridge, high], [1e3 * tflops] * 2, color="black", lw=1.2)
        for row in here:
            axis.scatter(
                row["flops"] / row["bytes"],
                row["flops"] / row["median"] / 1e9,
                color=COLOURS.get(row["impl"], "black"),
                marker=marker[row["op"]],
                s=34,
                alpha=0.85,
                linewidths=0,
            )
        axis.set(xscale="log", yscale="log", xlim=(low, high), title=title)
        axis.set(xlabel="useful FLOP per byte of least traffic", ylabel="useful GFLOP/s")
        axis.grid(which="major", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
    impls = [impl for impl in COLOURS if any(row["impl"] == impl for row in rows)]
    colours = [Line2D([], [], lw=6, color=COLOURS[impl], label=impl) for impl in impls]
    shapes = [Line2D([], [], marker=marker[o], ls="", color="black", label=o) for o in ops]
    figure.suptitle(describe(results).splitlines()[0], fontsize=11)
    for handles, x in ((colours, 0.25), (shapes, 0.73)):
        figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(x, 0.0),
            ncols=min(len(handles), 4),
            frameon=False,
            fontsize=9,
            columnspacing=1.2,
            handletextpad=0.4,
        )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--png", type=Path, help="draw a roofline (one file of results)")
    parser.add_argument("--goals", action="store_true", help="only the goals")
    given = parser.parse_args(arguments)
    try:
        found = [read(path) for path in given.files or [newest()]]
    except (OSError, ValueError) as fault:
        parser.error(str(fault))
    if given.png and len(found) > 1:
        parser.error(f"--png draws one file of results, got {len(found)}")
    for results in found:
        rows = [row for row in results.rows if is_op(row)]
        sys.stdout.write(describe(results) + "\n\n")
        if rows and not given.goals:
            lines = [list(COLUMNS), *(cells(row, rows) for row in rows)]
            sys.stdout.write(table(lines) + "\n\n")
        others = [row for row in results.rows if not is_op(row)]
        if others and not given.goals:
            lines = [["op", "size", "dtype", "mode", "impl", "median"]]
            lines += [
                [*(str(row.get(key, "-")) for key in lines[0][:5]), _seconds(row["median"])]
                for row in others
            ]
            sys.stdout.write(table(lines) + "\n\n")
        if rows:
            verdicts = judge(results)
            met = sum(line[4] == "met" for line in verdicts)
            head = ["op", "size", "dtype", "mode", "goal", "value", "asked"]
            sys.stdout.write(table([head, *verdicts]) + f"\n{met} of {len(verdicts)} met\n")
        if given.png:
            if not any(row["flops"] for row in rows):
                parser.error("--png: these results hold no op with FLOPs")
            roofline(results, given.png)
            sys.stdout.write(f"{given.png}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
