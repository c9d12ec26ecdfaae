"""Many calls of ``njepa train`` in one process, because starting one takes longer than each.

python -m tests.support.attempts reads lines [FOLDER, ARGUMENT, ...] and answers each with
[STATUS, STDOUT, STDERR], all in JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import program_env


class Attempts:
    """The process, from outside."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.attempts"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=program_env(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        )  # fmt: skip

    def __call__(self, folder: Path, *arguments: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of ``njepa train ARGUMENTS`` in ``folder``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(folder), *arguments]), file=self._process.stdin, flush=True)
        status, out, err = json.loads(self._process.stdout.readline())
        return status, out, err

    def close(self) -> None:
        self._process.communicate()


def _answer() -> None:
    from njepa import train
    from njepa.runs import ranks

    ranks.leave_ranks = lambda *_: None  # DeepSpeed keeps groups for ever
    answers, err = sys.stdout, io.StringIO()  # logging keeps the first stderr that it finds
    for line in sys.stdin:
        folder, *arguments = json.loads(line)
        os.chdir(folder)
        out: Any = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = train.main(arguments)
        print(json.dumps([status, out.getvalue(), err.getvalue()]), file=answers, flush=True)
        err.seek(0)
        err.truncate()


if __name__ == "__main__":
    _answer()
