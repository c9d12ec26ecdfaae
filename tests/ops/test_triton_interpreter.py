"""The Triton kernels without a GPU, in Triton's interpreter.

The switch must be set before Triton is imported, so the tests run in a process of their own: the
shared cases, the registration, and what lies in interpreter/.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OWN = sorted(path.name for path in (HERE / "interpreter").glob("test_*.py"))
SHARED = (
    "test_op_cases.py",
    "test_registration.py",
    "test_op_patchify.py",
    "test_op_jepa_loss.py",
    "test_op_adamw_ema.py",
    "test_jepa_loss_backward.py",
)
SUITES = {
    **{name: [name, "-k", "triton and not bad_arguments"] for name in SHARED},
    **{name: [f"interpreter/{name}"] for name in OWN},
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is run by this very test")
@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_in_the_interpreter(suite: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SUITES[suite]],
        cwd=HERE,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 2
    assert "skipped" not in done.stdout
