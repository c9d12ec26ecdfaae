"""A stand-in for Slurm on one machine: sbatch --wait, srun and scontrol requeue.

As Slurm does, it runs the script with its variables, sends the signal of ``--signal=B:NAME@...`` to
the batch shell alone, and starts a job that was requeued once more. ``STAND_IN_LIMIT`` says when
the time limit of the first start nears: FILE:LINES, once the file has so many.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def install(folder: Path) -> None:
    """Write the programs; ``folder`` belongs on PATH."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.support.slurm {name} "$@"\n')
        program.chmod(0o755)


def sbatch(arguments: list[str]) -> int:
    """``--wait --ntasks=N SCRIPT ...``; the status is the job's."""
    wait, tasks, script, *rest = arguments
    assert wait == "--wait"
    directives = dict(re.findall(r"^#SBATCH (--[\w-]+)=?(\S*)", Path(script).read_text(), re.M))
    shell_only, name = directives["--signal"].partition("@")[0].split(":")
    assert shell_only == "B"
    count = tasks.removeprefix("--ntasks=")
    requeue = Path(os.environ["STAND_IN"]) / "requeue"
    file, _, lines = os.environ.get("STAND_IN_LIMIT", ":0").rpartition(":")
    env = os.environ | {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": count, "SLURM_NTASKS_PER_NODE": count,
    }  # fmt: skip
    restarts = 0
    while True:
        job = subprocess.Popen(["bash", script, *rest], env=env)
        limited = bool(file) and not restarts
        while job.poll() is None:
            if limited and os.path.exists(file) and _lines(file) >= int(lines):
                job.send_signal(getattr(signal, f"SIG{name}"))
                limited = False
            time.sleep(0.02)
        if not requeue.exists() or "--requeue" not in directives:
            return job.returncode
        assert requeue.read_text() == env["SLURM_JOB_ID"]
        requeue.unlink()
        restarts += 1
        env["SLURM_RESTART_COUNT"] = str(restarts)
        print(f"stand-in: start {restarts + 1} of job {env['SLURM_JOB_ID']}", flush=True)


def _lines(file: str) -> int:
    return Path(file).read_text().count("\n")


def srun(command: list[str]) -> int:
    """Hands SIGUSR1 on to the tasks; the status is their highest."""
    tasks: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGUSR1, lambda number, _: [t.send_signal(number) for t in tasks])
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        more = {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
        tasks.append(subprocess.Popen(command, env=os.environ | place | more))
    return max(task.wait() % 256 for task in tasks)


def scontrol(arguments: list[str]) -> int:
    verb, job = arguments
    assert verb == "requeue"
    (Path(os.environ["STAND_IN"]) / "requeue").write_text(job)
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
