"""A whole training: set up, train, and where too many steps were bad go back once and on."""

from __future__ import annotations

import gc
import logging
from functools import partial
from typing import Any

from njepa.config import Config
from njepa.config.deepspeed_file import DeepSpeedFile
from njepa.runs.checkpoints import latest_checkpoint
from njepa.runs.folder import run_dir
from njepa.runs.place import here
from njepa.runs.ranks import Ranks
from njepa.runs.rollbacks import roll_back
from njepa.runs.signals import StopSignals
from njepa.training.health import NonFiniteLoss
from njepa.training.loop import Loop
from njepa.training.setup import set_up

log = logging.getLogger(__name__)


def train(
    config: Config, ds: DeepSpeedFile, ranks: Ranks, signals: StopSignals | None = None
) -> dict[str, Any] | None:
    """Train to the end or a stop; the summary on rank 0. Collective.

    Raises:
        NonFiniteLoss: too many bad steps in a row, and no way back is left. As ``set_up`` and
            ``Loop.run`` otherwise.
    """
    run = run_dir(config)
    here.way_out = lambda: (
        f"the last checkpoint is {latest_checkpoint(run) or 'none'}; go on with run.resume=true"
    )
    while True:
        setup = set_up(config, ds, ranks)
        try:
            return Loop(setup).run(signals)
        except NonFiniteLoss as error:
            step, began, told = error.step, error.row_began, str(error)
        limit = config.run.max_rollbacks
        back = ranks.on_main(partial(roll_back, run, step, began, limit))
        if back.to is None:
            raise NonFiniteLoss(
                f"{told}, and {back.told}; the last checkpoint is "
                f"{latest_checkpoint(run) or 'none'}, {run / 'bad'} holds what those steps were "
                f"made of (njepa replay). Lower optim.lr, lengthen optim.warmup_epochs, or set "
                f"gradient_clipping in the DeepSpeed file (docs/trouble.md)",
                step,
                began,
            )
        log.warning("%s: %s", told, back.told)
        setup.engine.close()
        del setup
        gc.collect()
        config = config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
