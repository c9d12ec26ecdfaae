"""Checkpoints that stay beside the ones that come and go: ``kept/step-00001200/``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def keep_checkpoint(run: Path, checkpoint: Path) -> Path:
    """Keep a checkpoint for ever; hard links, where the file system has them, cost no room.

    Raises:
        OSError: it cannot be kept, or was removed meanwhile.
    """
    place = run / "kept" / checkpoint.name
    if place.is_dir():
        return place
    unfinished = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(exist_ok=True)
    shutil.copytree(checkpoint, unfinished, copy_function=_link)
    os.rename(unfinished, place)
    return place


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # no hard links here
        shutil.copy2(source, target)
