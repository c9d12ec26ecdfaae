"""Run a table of ablations, or print it from what was run.

    python -m bench.evidence list
    python -m bench.evidence NAME [NAME ...] [--seeds 0 1 2] [--jobs 2] [--report]
    python -m bench.evidence all

Finished runs are kept in bench/results/evidence and never run twice, however a sweep ends; failed
ones run again. Then the tables are printed, and docs/evidence.md and its plots written again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from bench.evidence import report
from bench.evidence.cache import ROOT, finished, tasks_of
from bench.evidence.runs import sweep
from bench.evidence.tables import SEEDS, TABLES, Table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [table.name for table in TABLES]
    parser.add_argument(
        "names", nargs="+", choices=[*names, "all", "list"], metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (%(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    given = parser.parse_args(arguments)
    if given.jobs < 1 or min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
        parser.error("--jobs must be at least 1, --seeds different numbers >= 0")
    if "list" in given.names:
        _list(given.seeds)
        return 0
    tables = [t for t in TABLES if t.name in given.names or "all" in given.names]
    failed = []
    if not given.report:
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that train
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends its workers
        try:
            failed = sweep(tasks_of(tables, given.seeds), given.jobs, say=_say)
        except RuntimeError as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            _say("stopped; the finished runs are kept, the same command continues")
            return 130
    _print(tables, given.seeds)
    for path in report.write(given.seeds, tables):
        _say(f"wrote {path.relative_to(ROOT)}")
    return 1 if failed else 0


def _list(seeds: Sequence[int]) -> None:
    for table in TABLES:
        tasks = tasks_of([table], seeds)
        known = sum(finished(task) for task in tasks)
        _say(f"{table.name} ({known} of {len(tasks)} runs known): {table.title}")
        for arm in table.arms:
            _say(f"    {arm.name}{' (baseline)' if arm.name == table.baseline else ''}")
    tasks = tasks_of(TABLES, seeds)
    _say(f"all: {sum(finished(task) for task in tasks)} of {len(tasks)} runs known")


def _print(tables: Sequence[Table], seeds: Sequence[int]) -> None:
    floor = report.floors(seeds)
    for table in tables:
        rows = report.rows_of(table, seeds)
        _say(f"\n{table.title}\n\n{report.markdown(table, rows, floor, seeds)}\n")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
