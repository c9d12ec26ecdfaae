"""What this machine has: versions, device, and which implementation of each op can run.

python -m bench.facts
"""

from __future__ import annotations

import json
import platform
import sys
from functools import cache
from importlib import metadata
from typing import Any

import torch
from njepa_kernels import available_impls

PACKAGES = ("torch", "triton", "timm", "torchvision", "deepspeed", "pydantic", "pytest-benchmark")


def machine(device: torch.device) -> dict[str, Any]:
    """Where a number comes from."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    name = _cpu_name()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "kind": device.type,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


@cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def main() -> int:
    facts: dict[str, str | None] = {"device": None, "python": platform.python_version()}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts["device"] = f"{p.name}, {p.total_memory >> 20} MiB, sm_{p.major}{p.minor}"
    for name in PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    sys.stdout.write(json.dumps(available_impls(), indent=1) + "\n")
    sys.stdout.write(", ".join(f"{k} {v}" for k, v in facts.items()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
