"""A pytest plugin: a line in a file as soon as a test ends; what has one does not run again.

    pytest -p bench.gpu.ledger --ledger rows.jsonl --ledger-unit NAME ...

A line is an object with ``unit``, ``test`` (node id), ``outcome`` ("began", "passed", "failed",
"skipped"), ``why``, and for a benchmark what pytest-benchmark's own file would hold (``datetime``,
``command``, ``commit_info``, ``benchmarks``): ``bench.results`` reads both. Lines are appended and
flushed to the disk, so ``kill -9`` loses the test in work and no other. With pytest-xdist the
controller writes.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: A test that began so often without an end is not tried again: it kills or outlasts its process.
TRIES = 2


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines; the last one may be torn."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append_line(path: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line) + "\n"
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # behind a torn line
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def outcomes(lines: list[dict[str, Any]], unit: str) -> dict[str, str]:
    """The outcome of each test of a unit that need not run (again)."""
    began: Counter[str] = Counter()
    found: dict[str, str] = {}
    for line in lines:
        if line.get("unit") == unit:
            if line["outcome"] == "began":
                began[line["test"]] += 1
            else:
                found[line["test"]] = line["outcome"]
    given_up = {test: "gave up" for test, n in began.items() if n >= TRIES}
    return given_up | found


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ledger")
    group.addoption("--ledger", type=Path, required=True, help="the file of lines")
    group.addoption("--ledger-unit", required=True, help="whose lines they are")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(config), "ledger-writer")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = outcomes(read_lines(config.getoption("--ledger")), config.getoption("--ledger-unit"))
    dropped = [item for item in items if item.nodeid in done]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Iterator[None]:
    result: Any = yield
    report = result.get_result()
    stats = getattr(getattr(item, "funcargs", {}).get("benchmark"), "stats", None)
    if report.when == "call" and report.passed and stats:
        entry = json.dumps(stats.as_dict(include_data=False), default=str)
        report.user_properties.append(("benchmark", entry))
    if report.failed and _gpu_is_lost():
        item.session.shouldstop = "the GPU's context is broken: a new process must go on"


def _gpu_is_lost() -> bool:
    """After an illegal access every later call fails, whatever it does."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Writer:
    """Writes the lines, in the one process that sees all reports."""

    def __init__(self, config: pytest.Config) -> None:
        self.path, self.unit = config.getoption("--ledger"), config.getoption("--ledger-unit")
        options = ("--ledger", "--benchmark-json")
        args = [a for a in config.invocation_params.args if not a.startswith(options)]
        args = [a for a in args if a not in ("-p", "bench.gpu.ledger")]
        self.command = " ".join(["pytest", *args])
        self.commit = _commit()

    def line(self, test: str, outcome: str, **more: Any) -> None:
        append_line(self.path, {"unit": self.unit, "test": test, "outcome": outcome, **more})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.line(nodeid, "began")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        more: dict[str, Any] = {}
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            more["why"] = report.longrepr[2]
        elif report.outcome == "failed":
            more["why"] = report.longreprtext[-2000:]
        entries = [json.loads(v) for k, v in report.user_properties if k == "benchmark"]
        if entries:
            more |= {
                "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
                "command": self.command,
                "commit_info": {"id": self.commit},
                "benchmarks": entries,
            }
        self.line(report.nodeid, report.outcome, **more)


def _commit() -> str | None:
    """The revision, where git and its folder are there."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
