"""What several tests share: makers of inputs, oracles, programs that tests start.

A program finds this package, ``bench`` and the tests through ``PYTHONPATH`` (``program_env``).
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def program_env(**more: str) -> dict[str, str]:
    """The environment for a program that imports ``tests.support`` or ``bench``."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more
