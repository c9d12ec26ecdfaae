"""The limit on a stop holds while the main thread computes, where Python's handlers wait."""

import os
import signal
import subprocess
import sys
import time

import pytest

from njepa.runs.signals import INTERRUPTED, STEPS_LOST, STOPPED, StopSignals
from tests.support import program_env

PROGRAM = """
import ctypes, sys
from njepa.runs.signals import StopSignals
with StopSignals(float(sys.argv[1])) as signals:
    if sys.argv[2]:
        signals.lost = lambda: sys.argv[2]
    print("ready", flush=True)
    left = 60
    while left:  # one call of C; a signal cuts the sleep short, and the call is made again
        left = ctypes.CDLL(None).sleep(left)
"""


@pytest.mark.parametrize(
    ("grace", "lost", "numbers", "status", "told"),
    [
        (0.2, "", [signal.SIGTERM], STOPPED, "no step is lost"),
        (0.2, "3 steps are lost", [signal.SIGUSR1], STEPS_LOST, "(run.grace_s); 3 steps are lost"),
        (0.2, "3 steps are lost", [signal.SIGINT], STEPS_LOST, "0.2 s"),
        (60, "", [signal.SIGINT, signal.SIGINT], INTERRUPTED, "ended without a checkpoint"),
    ],
)
def test_the_end_comes_while_the_main_thread_computes(grace, lost, numbers, status, told):
    command = [sys.executable, "-c", PROGRAM, str(grace), lost]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=program_env(), stdout=pipe, stderr=pipe, text=True
    ) as program:
        program.stdout.readline()
        for number in numbers:
            program.send_signal(number)
            time.sleep(0.05)  # two at once are one
        _, error = program.communicate(timeout=30)
    assert program.returncode == status
    assert told in error


def test_what_the_signals_did_before_comes_back():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        with StopSignals(60) as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals._asked.wait(10)
        assert seen == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [1]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGUSR1, before)
