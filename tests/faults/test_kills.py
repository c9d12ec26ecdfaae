"""A few of the kills of ``python -m tests.faults.kills``."""

import subprocess
import sys

import pytest

from tests.support import ROOT, program_env

pytestmark = [pytest.mark.slow, pytest.mark.multirank]


def test_killed_runs_equal_the_others():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    command = [sys.executable, "-m", "tests.faults.kills", "--kills", "4", "--cases", "1,2"]
    done = subprocess.run(
        command, env=program_env(), cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("| equal |") == 2
