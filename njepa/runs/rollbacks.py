"""Going back to a checkpoint after too many bad steps, and what a resume must know of it.

``rollbacks.json`` lists them: ``from`` (steps done when the run gave up), ``to`` (the checkpoint's
step) and ``salt``, the number of the try, from which the draws of the data side follow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from njepa.atomic import write_atomically
from njepa.config import ConfigError
from njepa.runs.checkpoints import checkpoint_step, newest_good, set_aside_after

FILE = "rollbacks.json"


class Rollback(NamedTuple):
    """What was tried."""

    to: int | None
    """Steps done at the checkpoint that the run goes on from; None: it cannot."""
    told: str
    """For people."""


def read_rollbacks(run: Path) -> list[dict[str, int]]:
    """The rollbacks of a run so far; their number is the salt.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return []
    try:
        found: Any = json.loads(path.read_text())
        return [{key: int(entry[key]) for key in ("from", "to", "salt")} for entry in found]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{path} says which order of the data this run follows and cannot be read "
            f"({error}); restore it from a copy, or start a new run in another run.dir"
        ) from None


def roll_back(run: Path, step: int, row_began: int, limit: int) -> Rollback:
    """Make the last good checkpoint before a row of bad steps the one that a resume takes.

    Later ones, written within the row, get the ending ``.abandoned``.

    Args:
        step: steps done. row_began: steps done before the row. limit: ``run.max_rollbacks``.
    """
    before = read_rollbacks(run)
    if len(before) >= limit:
        times = f"{len(before)} time{'s' * (len(before) != 1)}"
        return Rollback(None, f"the run went back {times} already (run.max_rollbacks={limit})")
    good, _ = newest_good(run, up_to=row_began)
    if good is None:
        return Rollback(None, "there is no checkpoint before them to go back to")
    to = checkpoint_step(good.folder)
    entry = {"from": step, "to": to, "salt": len(before) + 1}
    try:
        write_atomically(run / FILE, json.dumps([*before, entry]) + "\n")
    except OSError as error:  # a full disk
        return Rollback(None, f"{run / FILE} cannot be written: {error}")
    set_aside_after(run, to, ".abandoned")
    return Rollback(
        to,
        f"going back to {good.folder} and on from there with another order of the data "
        f"(rollback {len(before) + 1} of {limit}, run.max_rollbacks)",
    )
