"""The GPU tests themselves, on a machine that lacks the trainer's packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HIDE = """
import sys, importlib.abc
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name in {hidden} else found(name, package)
importlib.util.find_spec = find_spec
"""


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["deepspeed", "pydantic"])
def test_without_the_trainers_packages_its_module_alone_is_skipped(
    tmp_path: Path, hidden: str
) -> None:
    (tmp_path / "hide.py").write_text(HIDE.format(hidden={hidden}))
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "hide", "-p", "no:cacheprovider", "-q",
         "--collect-only", "tests/gpu"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"the trainer needs {hidden}" in done.stdout
    assert "test_ops_gpu.py::" in done.stdout
