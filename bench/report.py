"""The table of the op benchmarks, which goals are met, and a roofline.

    python -m bench.report [FILES] [--png ROOFLINE.png] [--goals]

Without FILES: the newest in bench/results. Every row is printed, the losing ones too. Ratios above
1 mean faster than the opponent; % is of the ceiling measured in the same run (copy bandwidth,
matrix product for vicreg) and can exceed 100 where tensors stay in a cache; memory is the peak
above the inputs, divided by eager's.
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
COLUMNS = ("op", "size", "dtype", "mode", "impl", "median", "rate", "% ceil", "x eager")
COLUMNS += ("x compile", "memory")


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


def cells(row: Row, rows: list[Row]) -> list[str]:
    rate = f"{row['gbps']:.1f} GB/s"
    if row["bound"] == "matmul":
        rate = _flops(row["tflops"])
    return [
        *_key(row),
        row["impl"],
        _seconds(row["median"]),
        rate,
        f"{100 * row['fraction']:.0f}",
        _ratio(row["ratio_eager"]),
        _ratio(row["ratio_compile"]),
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


_TOKEN_OPS = ("predictor_tokens", "jepa_loss", "gather_tokens")
GOALS = [
    Goal("2 x eager", "cpu", _of(*_TOKEN_OPS), _field("ratio_eager"), least=2.0),
    Goal("not slower than compile", "cpu", _of(*_TOKEN_OPS), _field("ratio_compile"), least=1.0),
    Goal("4 x eager", "cpu", _of("vicreg", size="n256-d2048"), _field("ratio_eager"), least=4.0),
    Goal(
        "2 x the loop over parameters",
        "cpu",
        _of("ema_update_", mode="fwd"),
        _field("ratio_eager"),
        least=2.0,
    ),
    Goal(
        "85 % of copy bandwidth",
        "cuda",
        lambda row: row["bound"] == "copy",
        _field("fraction"),
        least=0.85,
    ),
    Goal("3 x eager", "cuda", lambda row: row["bound"] == "copy", _field("ratio_eager"), least=3.0),
    Goal(
        "1.2 x compile",
        "cuda",
        lambda row: row["bound"] == "copy",
        _field("ratio_compile"),
        least=1.2,
    ),
    Goal("3 x eager", "cuda", _of("vicreg", size="n2048-d8192"), _field("ratio_eager"), least=3.0),
    Goal(
        "half of eager's memory",
        "cuda",
        _of("predictor_tokens", "jepa_loss"),
        memory_ratio,
        most=0.5,
    ),
]


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
