"""What a run folder holds, as far as it can be read; what is absent or damaged is named."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from njepa.config import Config, ConfigError, parse_config
from njepa.config.reading import read_yaml_file
from njepa.runs.checkpoints import latest_checkpoint
from njepa.runs.folder import flat

#: Files of a run folder that hold JSON and no results of probes.
_OURS = {"ds.json", "summary.json"}
_LARGEST = 4_000_000  # bytes of a JSON file that is read


@dataclass
class RunRecord:
    """A run, as far as its folder tells."""

    path: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """``config.yaml``, flat: ``section.key`` to value."""
    config: Config | None = None
    """The same, checked; None where this version cannot read it."""
    ds: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Of ``metrics.jsonl``; each has a step."""
    summary: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What ``njepa probe --json`` wrote into the folder, by file name."""
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    """``state.json`` of the checkpoint."""
    missing: list[str] = field(default_factory=list)
    """What is not there, in words."""

    @property
    def method(self) -> str:
        return str(self.settings.get("method") or self.summary.get("method") or "unknown method")

    @property
    def last_step(self) -> int:
        steps = [line["step"] for line in self.lines]
        known = [number(self.state.get("step")), number(self.summary.get("steps")), *steps]
        return int(max((step for step in known if step is not None), default=0))

    @property
    def total_steps(self) -> int | None:
        """Length of the whole training; None where nothing tells it."""
        for value in (self.state.get("total_steps"), self.settings.get("run.max_steps")):
            if (total := number(value)) is not None:
                return int(total)
        epochs = number(self.settings.get("optim.epochs"))
        for line in reversed(self.lines):
            epoch = number(line.get("epoch"))
            if epochs and epoch and epoch > 0.05:
                return round(epochs * int(line["step"]) / epoch)
        return int(number(self.summary.get("steps")) or 0) or None

    def values(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of the lines that have a finite number under ``key``."""
        found = ((line["step"], number(line.get(key))) for line in self.lines)
        return [(step, value) for step, value in found if value is not None]


def number(value: object) -> float | None:
    """``value`` as a finite number; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer without end
        return None


def read_runs(paths: Iterable[Path]) -> list[RunRecord]:
    """All runs, under names that tell them apart.

    Raises:
        ConfigError: a path that is no run folder, or the same one twice.
    """
    paths = list(paths)
    for i, path in enumerate(paths):
        if any(os.path.realpath(path) == os.path.realpath(other) for other in paths[:i]):
            raise ConfigError(f"{path} is given twice; name each run once")
    names = [path.resolve().name or str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """The run in ``path``.

    Raises:
        ConfigError: it is no folder, or holds nothing of a run.
    """
    if not path.is_dir():
        fault = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {fault}; expected a run folder, the run.dir of a training")
    wanted = ("config.yaml", "metrics.jsonl", "summary.json")
    try:
        held = [entry for entry in wanted if (path / entry).is_file()]
        inside = sorted(os.listdir(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not held:
        raise ConfigError(
            f"{path} holds no run: expected {', '.join(wanted[:-1])} or {wanted[-1]}, got "
            f"{', '.join(inside[:8]) or 'an empty folder'}"
        )
    run = RunRecord(path, name or path.resolve().name)
    _read_settings(run)
    run.ds = _json_object(path / "ds.json", run.missing)
    _read_lines(run)
    if (path / "summary.json").is_file():
        run.summary = _json_object(path / "summary.json", run.missing)
    else:
        run.missing.append("summary.json: it is written when a training is complete")
    _read_checkpoint(run)
    for file in sorted(path.glob("*.json")):
        if file.name not in _OURS and file.stat().st_size < _LARGEST:
            probe = _json_object(file, [])
            if isinstance(probe.get("subject"), dict) and isinstance(probe.get("settings"), dict):
                run.probes[file.name] = probe
    return run


def _read_settings(run: RunRecord) -> None:
    try:
        if not (run.path / "config.yaml").exists():
            run.missing.append("config.yaml: no settings, and no pictures without them")
            return
        raw = read_yaml_file(run.path / "config.yaml", "it")
        if not isinstance(raw, dict):
            raise ValueError(f"expected sections, got {type(raw).__name__}")
    except (OSError, ValueError) as error:
        run.missing.append(f"config.yaml cannot be read, so there are no pictures: {error}")
        return
    run.settings = flat(raw)
    try:
        run.config = parse_config(raw, "config.yaml")
    except ConfigError as error:
        run.missing.append(f"pictures, because this version cannot read the settings: {error}")


def _read_lines(run: RunRecord) -> None:
    file = run.path / "metrics.jsonl"
    try:
        texts = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        run.missing.append("metrics.jsonl: no curves, and no verdict without them")
        return
    except OSError as error:
        run.missing.append(f"metrics.jsonl cannot be read: {error}")
        return
    bad, last = 0, 0
    for count, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            step = number(line["step"])
            if step is None:
                raise ValueError("no step")
            run.lines.append(line | {"step": int(step)})
        except (ValueError, KeyError, TypeError, RecursionError):
            bad, last = bad + 1, count
    run.lines.sort(key=lambda line: int(line["step"]))
    if bad:
        place = "the last one" if bad == 1 and last == len(texts) else f"the last is line {last}"
        run.missing.append(f"{bad} of the lines of metrics.jsonl: cut off or damaged ({place})")
    if not run.lines:
        run.missing.append("curves: metrics.jsonl holds no complete line")


def _read_checkpoint(run: RunRecord) -> None:
    try:
        run.checkpoint = latest_checkpoint(run.path)
    except OSError as error:
        run.missing.append(f"checkpoints/ cannot be read: {error}")
        return
    if run.checkpoint is None:
        run.missing.append(
            "a complete checkpoint: no pictures of features, neighbours and errors without one"
        )
        return
    run.state = _json_object(run.checkpoint / "state.json", run.missing)


def _json_object(file: Path, missing: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(errors="replace"))
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {type(found).__name__}")
        return found
    except FileNotFoundError:
        missing.append(file.name)
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{file.name} cannot be read: {error}")
    return {}
