"""Whole runs of the command line: a folder with images, and programs that train in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support import ROOT, program_env
from tests.support.jobs import TINY, make_images

TRAIN = [str(ROOT / "njepa/train.py")]


def ranks(count: int) -> list[str]:
    """What stands before a program that ``count`` ranks run."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]


def prepare(root: Path) -> Path:
    """16 images and ``ds.json``, steps of 4."""
    make_images(root / "images", 16)
    (root / "ds.json").write_text('{"train_batch_size": 4}')
    return root


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the folder ``root``, on the CPU."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, text=True, capture_output=True, timeout=300,
        env=program_env(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )  # fmt: skip


def train(
    root: Path, name: Path | str, program: list[str], *overrides: str
) -> subprocess.CompletedProcess[str]:
    """A run ``name`` in a folder that ``prepare`` has made; ``program``: behind ``python``."""
    return python(
        root, *program, "--ds_config", "ds.json", *TINY, "data.path=images", "data.cache_dir=cache",
        f"run.dir={name}", "run.device=cpu", *overrides,
    )  # fmt: skip
