"""Checkpoints: DeepSpeed's files, the target encoder as safetensors, and a JSON state.

``checkpoints/step-00001200/`` is written under a temporary name, read back, and renamed; the one
before is removed only after that. DeepSpeed's files are pickles of this very run: they are read
from the run folder only, and what leaves the folder is safetensors (docs/running.md).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from njepa.atomic import write_atomically
from njepa.config import ConfigError
from njepa.runs.ranks import Ranks

_NAME = re.compile(r"step-(\d{8})$")


class Saved(Protocol):
    """What a checkpoint needs of the engine."""

    @property
    def stage(self) -> int:
        """Of ZeRO: how weights and moments are spread over the ranks."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def save_checkpoint(
    run: Path,
    step: int,
    engine: Saved,
    target: nn.Module,
    state: dict[str, Any],
    ranks: Ranks,
    keep: int,
) -> Path:
    """Write the state after ``step`` optimizer steps; collective over all ranks.

    Args:
        state: plain JSON values that describe the run: data_digest, global_batch, and what else
            may be of use (config, versions).
        keep: complete checkpoints that stay, this one included.
    """
    root = run / "checkpoints"
    temporary, final = root / f".step-{step:08d}.tmp", root / f"step-{step:08d}"
    if ranks.main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    engine.save(temporary)

    facts = {"step": step, "world": ranks.world, "zero_stage": engine.stage, **state}

    def finish() -> None:
        tensors = {k: v.detach().cpu().contiguous() for k, v in target.state_dict().items()}
        save_file(tensors, temporary / "target_encoder.safetensors", metadata={"step": str(step)})
        write_atomically(
            temporary / "state.json",
            json.dumps(facts, indent=2) + "\n",
        )
        _verify(temporary, tensors)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        for old in _complete(root)[:-keep]:
            shutil.rmtree(old)

    ranks.barrier()
    ranks.on_main(finish)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    found = _complete(run / "checkpoints")
    return found[-1] if found else None


def load_checkpoint(
    path: Path, engine: Saved, target: nn.Module, ranks: Ranks, digest: str, global_batch: int
) -> dict[str, Any]:
    """Restore engine and target encoder; returns the JSON state.

    Raises:
        ConfigError: data, ranks, ZeRO stage or batch differ from those of the checkpoint.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    if state["data_digest"] != digest:
        raise ConfigError(
            f"{path} was written on other data (index digest {state['data_digest'][:12]}, now "
            f"{digest[:12]}): the sample ids would refer to other images; restore the data, or "
            f"start a new run in another run.dir"
        )
    stage = engine.stage
    if state["zero_stage"] != stage or (stage > 0 and state["world"] != ranks.world):
        raise ConfigError(
            f"{path} was written by {state['world']} ranks with ZeRO stage {state['zero_stage']}, "
            f"now there are {ranks.world} with stage {stage}; restart with {state['world']} ranks "
            f"and ZeRO stage {state['zero_stage']}"
        )
    if state["global_batch"] != global_batch:
        raise ConfigError(
            f"{path} was written with an effective batch of {state['global_batch']}, now it is "
            f"{global_batch}: each step would use other images; restore the batch size in the "
            f"DeepSpeed file"
        )
    engine.load(path)
    target.load_state_dict(load_file(path / "target_encoder.safetensors"))
    return state


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, for the JSON state."""
    import deepspeed

    import njepa

    return {
        "njepa": njepa.__version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def _complete(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.match(p.name) and (p / "state.json").is_file())


def _verify(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read back what was written; an unreadable checkpoint must not replace a readable one."""
    with safe_open(folder / "target_encoder.safetensors", framework="pt") as file:
        if set(file.keys()) != set(tensors):
            raise OSError(f"{folder}: target_encoder.safetensors does not hold what was written")
    for file_path in folder.rglob("*.pt"):
        with open(file_path, "rb") as raw:  # a torch file is a zip archive
            if raw.read(2) != b"PK":
                raise OSError(f"{file_path} is not a complete torch file")
