"""What this machine has: versions, device, and which implementation of each op can run.

python -m bench.facts
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata

import torch
from njepa_kernels import available_impls

PACKAGES = ("torch", "triton", "timm", "torchvision", "deepspeed", "pydantic", "pytest-benchmark")


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
