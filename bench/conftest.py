"""Options of the benchmarks, and the command in the JSON that pytest-benchmark writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("njepa benchmarks")
    group.addoption(
        "--op-seconds",
        type=float,
        help="op benchmarks: begin no further size after this time (CPU 160, GPU 420; with --full "
        "no bound); what is left is skipped with that reason",
    )
    group.addoption(
        "--full",
        action="store_true",
        help="on a CPU, also what takes it beyond five minutes in all; a GPU runs everything",
    )
    group.addoption("--ops", nargs="+", metavar="OP", help="op benchmarks: only these ops")
    group.addoption("--sizes", nargs="+", metavar="TEXT", help="only sizes that contain a TEXT")
    group.addoption("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full") or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="takes a CPU long: only with --full")
    for item in items:
        if item.get_closest_marker("slow_on_cpu"):
            item.add_marker(skip)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    kept = [a for a in config.invocation_params.args if not a.startswith("--benchmark-json")]
    output_json["command"] = " ".join(["pytest", *kept])
