"""One small JSON file per arm and seed, named by a digest of all that decides its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from bench.evidence.tables import IJEPA, RECIPE, Settings, Table
from njepa.atomic import write_atomically

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "results" / "evidence"
DS_CONFIG = ROOT / "ds.json"
#: Settings that begin so belong to the DeepSpeed file.
DS_PREFIX = "ds."
SCHEMA = 1

#: Settings of every run that decide none of its numbers.
TECHNICAL: Settings = {
    "run.device": "cpu", "run.tensorboard": False, "run.progress": False,
    "run.checkpoint_every": 10**9, "run.keep_checkpoints": 1,  # the last one is always written
    "data.backend": "torch", "data.workers": 0,
    "eval.every": None,
}  # fmt: skip
#: Others that decide none, and that a recipe may have.
_IGNORED = {*TECHNICAL, "run.log_every", "run.dir", "data.cache_dir", "data.prefetch"}


@dataclass(frozen=True)
class Task:
    """One run: an arm under a seed; or, without an arm, what needs no training."""

    name: str
    overrides: Settings
    seed: int
    floors: bool = False
    """The untrained network and the raw pixels, which are the same for every arm."""

    @property
    def asked(self) -> dict[str, Any]:
        """What is written over the recipe and decides the numbers."""
        recipe = {k: v for k, v in self.overrides.items() if not k.startswith(DS_PREFIX)}
        return {**recipe, "run.seed": self.seed}

    @property
    def ds(self) -> dict[str, Any]:
        """``ds.json`` with what an arm writes over it."""
        own = {
            k.removeprefix(DS_PREFIX): v
            for k, v in self.overrides.items()
            if k.startswith(DS_PREFIX)
        }
        return {**json.loads(DS_CONFIG.read_text(encoding="utf-8")), **own}

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe and all that is written over it, flat, without what decides no number."""
        merged = {**_recipe(), **self.asked}
        return {key: merged[key] for key in sorted(merged) if key not in _IGNORED}

    @property
    def key(self) -> str:
        """Name of the file; readable in front, the digest behind."""
        content = {
            "schema": SCHEMA, "floors": self.floors, "settings": self.settings, "ds": self.ds,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        kind = "floors" if self.floors else self.settings.get("method", "default")
        return f"{kind}-s{self.seed}-{digest[:12]}"

    @property
    def steps(self) -> int:
        """Length of the training; 0 where there is none."""
        return 0 if self.floors else int(self.asked["run.max_steps"])

    def arguments(self, run_dir: Path) -> list[str]:
        """``section.key=value`` for ``njepa.recipes.load_config``."""
        given = {
            **TECHNICAL,
            **self.asked,
            "run.log_every": max(1, self.steps // 25),
            "run.dir": str(run_dir),
        }
        return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def tasks_of(tables: Iterable[Table], seeds: Iterable[int]) -> list[Task]:
    """All runs of the tables, each once, first seed of every arm first."""
    found: dict[str, Task] = {}
    tables = list(tables)
    for seed in seeds:
        task = Task("untrained", IJEPA, seed, floors=True)  # of any length
        found.setdefault(task.key, task)
        for table in tables:
            for arm in table.arms:
                task = Task(f"{table.name}: {arm.name}", {**table.base, **arm.overrides}, seed)
                found.setdefault(task.key, task)
    return list(found.values())


def load(task: Task, folder: Path = FOLDER) -> dict[str, Any] | None:
    """What is known of a run, finished or failed; None where it has not run.

    Raises:
        ValueError: the file is not one of ``save``.
    """
    path = folder / f"{task.key}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove it and run again") from None
    if not isinstance(record, dict) or record.get("status") not in ("done", "failed"):
        raise ValueError(f"{path} is no result of bench.evidence; remove it and run again")
    return record


def finished(task: Task, folder: Path = FOLDER) -> bool:
    record = load(task, folder)
    return record is not None and record["status"] == "done"


def save(task: Task, record: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write ``record`` with what was run; a failure never replaces a result."""
    path = folder / f"{task.key}.json"
    if record["status"] == "failed" and finished(task, folder):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    head = {"schema": SCHEMA, "key": task.key, "run": task.name, "seed": task.seed}
    whole = {**head, **record, "settings": task.settings, "ds": task.ds}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in whole.items()]
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


@cache
def _recipe() -> dict[str, Any]:
    text = (resources.files("njepa.recipes") / f"{RECIPE}.yaml").read_text(encoding="utf-8")
    return _flat(yaml.safe_load(text))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
