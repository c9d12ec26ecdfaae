"""Each native CUDA op once, forward and backward, on small cases; for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py

Without torch's cache of memory every tensor is an allocation of its own: memcheck then sees an
access just beyond one.
"""

from __future__ import annotations

import os
import sys
from functools import partial

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from njepa_kernels._runtime import native
from njepa_kernels.testing import all_cases, evaluate


def main() -> int:
    """Run all; 1 where there is no GPU or no native library."""
    status = native.available(device_type="cuda")
    if status != "yes" or not torch.cuda.is_available():
        sys.stderr.write(f"nothing to check: {status}; GPU: {torch.cuda.is_available()}\n")
        return 1
    device = torch.device("cuda")
    for op in native.CUDA_OPS:
        for case in all_cases(op, small=True):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                inputs = case.make_inputs(device, dtype, 0)
                evaluate(case, partial(case.function, impl="native"), inputs)
            torch.cuda.synchronize()
            print(f"{case.name}: done", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
