"""Results kept in the repository: from pytest-benchmark's JSON to a small one, and back.

    python -m bench.results RAW.json|ROWS.jsonl ... [--out bench/results]

writes ``<device>-<date>.json``:

    {"schema": 1, "device": ..., "kind": "cpu" | "cuda", "date": "YYYY-MM-DD", "commands": [...],
     "commit": ..., "versions": {"python", "torch", "triton"}, "threads": ...,
     "rows": [{"op", "size", "dtype", "mode", "impl", "median", "min", "iqr", "rounds", ...}]}

Times are seconds per call. The rest of a row is the benchmark's ``extra_info`` without what the
head says. Raw files of several devices or versions are refused: one file, one machine.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
#: What makes a row; ``dtype`` and ``mode`` may be missing where they say nothing (loader).
KEYS = ("op", "size", "impl")
_HEAD = ("device", "kind", "torch", "triton", "python", "threads")


@dataclass(frozen=True)
class Results:
    """One file: where it comes from, and its rows."""

    device: str
    kind: str
    date: str
    commands: list[str]
    commit: str | None
    versions: dict[str, str | None]
    threads: int | None
    rows: list[dict[str, Any]]


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as fault:
        raise ValueError(f"{path} is no JSON ({fault}); was its run cut short?") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def compact(paths: list[Path]) -> Results:
    """The results of pytest-benchmark's files, or of ``bench.gpu.ledger``'s (.jsonl), as one.

    Raises:
        ValueError: a file is neither, or the files are of different machines.
    """
    raws = []
    for path in paths:
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            raws += [line for line in lines if "benchmarks" in line]
            continue
        raw = _load(path)
        if "benchmarks" not in raw:
            raise ValueError(
                f"{path}: expected a file of pytest --benchmark-json, got the keys {sorted(raw)}"
            )
        raws.append(raw)
    return compact_raw(raws, ", ".join(map(str, paths)))


def compact_raw(raws: list[dict[str, Any]], where: str) -> Results:
    """What pytest-benchmark wrote as one; ``where`` it comes from, for the messages."""
    heads: dict[str, set[Any]] = {key: set() for key in _HEAD}
    rows, dates = [], []
    commands: dict[str, None] = {}  # in their order, each once
    commits = set()
    for raw in raws:
        dates.append(str(raw["datetime"])[:10])
        commits.add((raw.get("commit_info") or {}).get("id"))
        commands[str(raw.get("command", "pytest"))] = None
        for entry in raw["benchmarks"]:
            row = dict(entry["extra_info"])
            missing = [key for key in KEYS if key not in row]
            if missing:
                raise ValueError(f"{where}: {entry['name']} has no {', '.join(missing)}")
            for key in _HEAD:
                if key in row:
                    heads[key].add(row.pop(key))
            stats = entry["stats"]
            times = {key: stats[key] for key in ("median", "min", "iqr", "rounds")}
            row.setdefault("clock", "wall")  # pytest-benchmark's own
            rows.append({key: row.pop(key) for key in KEYS} | times | row)
    for key, values in heads.items():
        if len(values) > 1:
            raise ValueError(f"one file is of one machine, but {key} is any of {sorted(values)}")
    if not rows:
        raise ValueError(f"no benchmark in {where}")
    head = {key: next(iter(values), None) for key, values in heads.items()}
    return Results(
        device=head["device"] or "unknown",
        kind=head["kind"] or "cpu",
        date=max(dates),
        commands=list(commands),
        commit=commits.pop() if len(commits) == 1 else None,
        versions={key: head[key] for key in ("python", "torch", "triton")},
        threads=head["threads"],
        rows=sorted(rows, key=lambda r: [str(r.get(k)) for k in ("op", "size", "dtype", "mode")]),
    )


def write(results: Results, folder: Path = FOLDER) -> Path:
    """Writes ``<device>-<date>.json``; the same machine on the same day is one file."""
    device = re.sub(r"[^a-z0-9]+", "-", results.device.lower().replace("(r)", "")).strip("-")
    path = folder / f"{device}-{results.date}.json"
    folder.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in vars(results).items() if key != "rows"}
    lines = ",\n".join(json.dumps(_rounded(row)) for row in results.rows)
    text = json.dumps({"schema": SCHEMA} | head, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    return path


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Five digits: the rest is noise, and differences between files stay readable."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def read(path: Path) -> Results:
    """Raises ValueError where the file is not one of ``write``."""
    found = _load(path)
    if found.pop("schema", None) != SCHEMA:
        raise ValueError(
            f"{path}: expected results of schema {SCHEMA}; make them with "
            "python -m bench.results RAW.json"
        )
    try:
        results = Results(**found)
    except TypeError as fault:
        raise ValueError(f"{path}: {fault}") from None
    for row in results.rows:
        missing = [key for key in (*KEYS, "median") if key not in row]
        if missing:
            raise ValueError(f"{path}: a row has no {', '.join(missing)}: {row}")
    return results


def newest(folder: Path = FOLDER) -> Path:
    """The file with the last date, of these the one written last."""
    files = sorted(folder.glob("*.json"), key=lambda p: (p.stem[-10:], p.stat().st_mtime))
    if not files:
        raise ValueError(f"no results in {folder}; make them with make bench")
    return files[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.results", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("raw", nargs="+", type=Path, help="files of pytest --benchmark-json")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        path = write(compact(given.raw), given.out)
    except (OSError, ValueError) as fault:
        parser.error(str(fault))
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
