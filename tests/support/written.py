"""Checkpoints without a training: real files around given tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from njepa.runs.checkpoint_files import TARGET as TARGET_FILE
from njepa.runs.checkpoint_files import CheckpointFiles
from njepa.runs.checkpoints import latest_checkpoint
from njepa.runs.ranks import Ranks
from njepa.runs.saving import CheckpointWriter
from njepa.runs.snapshot import Piece

ALONE = Ranks(0, 1, 0, torch.device("cpu"), None)
#: Of the checkpoints of ``save``.
TARGET = {"w": torch.arange(6.0).reshape(2, 3)}
STATE = {"data_digest": "d" * 64, "global_batch": 8, "micro": 8, "accumulation": 1, "shared": {}}


def pieces(tensors: dict[str, Tensor]) -> list[Piece]:
    return [Piece(key, t.reshape(-1), 0, tuple(t.shape)) for key, t in tensors.items()]


def write_checkpoint(
    run: Path,
    step: int,
    tensors: dict[str, Tensor],
    target: Mapping[str, Tensor],
    writer: CheckpointWriter | None = None,
    **state: Any,
) -> Path:
    """Save and wait for it; keys are ``weight/NAME`` and so on.

    Raises:
        CheckpointFailed: it could not be written.
    """
    writer = writer or CheckpointWriter(run, ALONE, keep=2)
    writer.save(step, pieces(tensors), target, STATE | state)
    writer.finish()
    path = latest_checkpoint(run)
    assert path is not None
    return path


def save(run: Path, step: int, writer: CheckpointWriter | None = None, **state: Any) -> Path:
    """A small checkpoint whose values tell its step."""
    tensors = {"weight/a": torch.full((300,), float(step)), "step/a": torch.tensor(float(step))}
    return write_checkpoint(run, step, tensors, TARGET, writer, **state)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def flip(path: Path, at: int = -3) -> None:
    """Change a bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def differences(a: Path, b: Path) -> list[str]:
    """Tensors of two checkpoints that are not the same bit for bit, whoever wrote which range."""
    first, second = CheckpointFiles(a), CheckpointFiles(b)
    keys = {*first.keys(), *second.keys()}
    found = [
        key for key in sorted(keys)
        if key not in first or key not in second or not _same(first.whole(key), second.whole(key))
    ]  # fmt: skip
    targets = [load_file(path / TARGET_FILE) for path in (a, b)]
    names = targets[0].keys() | targets[1].keys()
    found += [
        f"target {name}" for name in sorted(names)
        if not all(name in t for t in targets) or not _same(*(t[name] for t in targets))
    ]  # fmt: skip
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Bits: neither zeros of two signs nor NaNs are taken for equal or different."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool((a.reshape(-1).view(torch.uint8) == b.reshape(-1).view(torch.uint8)).all())
