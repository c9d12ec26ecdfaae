"""What a bad step was made of, for people and for ``njepa replay``.

``bad/step-00000123.json``, after a rollback ``step-00000123-try1.json``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from njepa.atomic import write_atomically
from njepa.config import ConfigError

#: Files that a run writes at most; what breaks so many steps is in the first ones.
MOST = 20


class Dump(BaseModel):
    """A bad step; numbers that JSON has no word for are "nan", "inf" and "-inf"."""

    model_config = ConfigDict(extra="forbid")

    njepa: str
    step: int = Field(ge=0)
    """Steps done before it; log lines count it as ``step + 1``."""
    epoch: int
    seed: int
    salt: int = Field(ge=0)
    """Rollbacks before it."""
    ranks: int = Field(gt=0)
    micro: int = Field(gt=0)
    accumulation: int = Field(gt=0)
    zero_stage: int
    precision: Literal["fp32", "torch_autocast", "bf16"]
    lr: float
    weight_decay: float
    ema: float
    sample_ids: list[list[int]]
    """Of each micro-step: the samples of all ranks, rank after rank."""
    images: list[list[str]]
    """Their names."""
    terms: list[list[dict[str, float | str]]]
    """Of each rank and micro-step."""
    not_finite_terms: list[str]
    gradient: dict[str, Any]
    """``norm``; ``by_module`` and ``not_finite`` (parameters), or ``why_not``."""
    checkpoint: str | None
    """Folder inside of the run folder from which the step can be repeated; None: from the start."""
    data_digest: str
    versions: dict[str, str]
    config: dict[str, Any]
    ds: dict[str, Any]


def number(value: float) -> float | str:
    """For JSON."""
    return value if math.isfinite(value) else str(value)


def write_dump(run: Path, dump: Dump) -> Path | None:
    """Write it, unless the run has ``MOST`` of them; returns where.

    Raises:
        OSError: it cannot be written.
    """
    folder = run / "bad"
    folder.mkdir(exist_ok=True)
    again = f"-try{dump.salt}" if dump.salt else ""
    path = folder / f"step-{dump.step:08d}{again}.json"
    if len(list(folder.glob("step-*.json"))) >= MOST:
        return None
    write_atomically(path, dump.model_dump_json(indent=1) + "\n")
    return path


def read_dump(path: Path) -> Dump:
    """Read and check a dump.

    Raises:
        ConfigError: there is none, or it holds something else.
    """
    try:
        raw = json.loads(path.read_text())
        return Dump.model_validate(raw)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; expected bad/step-XXXXXXXX.json of a run"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{path} is not a dump of this version of njepa: {where}: {first['msg'].lower()}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a dump of njepa: {error}") from None
