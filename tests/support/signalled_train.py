"""Trainings that get a signal at a chosen moment, each in a fork of one process that imported all.

    python -m tests.support.signalled_train STARTS.json     prints the statuses as JSON

Every start is {arguments, log, moment, number, call}: the process sends itself the signal before
that call of the function ``moment``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

#: Functions by a word.
MOMENTS = {
    "set-up": ("njepa.training.loop", "start_table"),
    "step": ("njepa.training.setup", "training_step"),
    "save": ("njepa.runs.saving", "CheckpointWriter._write"),
    "stuck save": ("njepa.runs.saving", "CheckpointWriter._write"),
    "evaluation": ("njepa.evaluation.evaluate", "Evaluator.knn"),
    "last evaluation": ("njepa.evaluation.evaluate", "Evaluator.final"),
}


def _signal_before(moment: str, number: int, call: int) -> None:
    module, path = MOMENTS[moment]
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    action, calls = getattr(owner, name), []

    def signalling(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            time.sleep(600 if moment == "stuck save" else 0.2)  # a thread notes it
        return action(*args, **kwargs)

    setattr(owner, name, signalling)


def _start(arguments: list[str], log: str, **when: Any) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        from njepa import train

        if when:
            _signal_before(**when)
        status = train.main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    importlib.import_module("njepa.training.run")
    starts = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([_start(**start) for start in starts]))


if __name__ == "__main__":
    main()
