"""What ``python -m tests.faults.peers`` does to one of two ranks, and how both end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from njepa.runs.peers import STATUS
from tests.faults.peers import CASES, TIMEOUT
from tests.support import ROOT, program_env

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

_GONE = "its process is gone"
_SILENT = f"has been silent for {TIMEOUT} s: its process is stopped"
_HANGS = f"has not moved for {TIMEOUT} s, in hang (__main__, line "
#: Statuses, and parts of what each rank says; of a rank that says nothing none.
EXPECTED = {
    "killed": ([STATUS, -9], [["rank 1 (host ", _GONE], []]),
    "killed under ZeRO 2": ([STATUS, -9], [["rank 1 (host ", _GONE], []]),
    "rank 0 killed": ([-9, STATUS], [[], ["rank 0 (host ", _GONE]]),
    "stopped": ([STATUS, None], [["rank 1 (host ", _SILENT], []]),
    "rank 0 stopped": ([None, STATUS], [[], ["rank 0 (host ", _SILENT]]),
    "hangs in a step": (
        [STATUS] * 2,
        [
            ["rank 1 (host ", "last in step 4, training, " + _HANGS, "njepa.training.loop"],
            ["rank 1 (host ", _HANGS, "most recent call first", "in hang"],
        ],
    ),
    "rank 0 hangs in a save": (
        [STATUS] * 2,
        [["rank 0 (host ", "last in step 4, saving, " + _HANGS], ["rank 0 (host ", _HANGS]],
    ),
    "raises": (
        [STATUS, 1],
        [["rank 1 (host ", "ended: ValueError: this rank alone"], ["Traceback", "this rank alone"]],
    ),
    "loader ends": (
        [1, 1],
        [["njepa: rank 1: the loader of rank 1 ended at micro-batch 1 of step 5"], []],
    ),
    "evaluates for long": ([0, 0], [["all numbers are in"], []]),
    "missing": ([STATUS], [["did not meet all 2 ranks at 127.0.0.1:", "1/2 clients joined"]]),
    "other settings": (
        [2, 2],
        [["run.seed: 0 on rank 0 (", "5 on rank 1 (", "optim.lr: 0.003 on rank 0 ("], []],
    ),
    "other images": (
        [2, 2],
        [["holds other images on rank 1", "19 images", "18 images"], []],
    ),
    "no images": ([2, 2], [["rank 1 (", "nowhere"], []]),
    "other code": (
        [2, 2], [["file njepa/objectives.py: ", "0123456789ab on rank 1 ("], []],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def records():
    """All cases in one process: importing takes longer than any of them."""
    command = [sys.executable, "-m", "tests.faults.peers"]
    done = subprocess.run(
        command, env=program_env(), cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {record["case"]: record for record in map(json.loads, done.stdout.splitlines())}


def test_every_case_has_its_words():
    assert EXPECTED.keys() == CASES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_both_ranks_end_and_say_why(records, name):
    record, (statuses, words) = records[name], EXPECTED[name]
    told = "\n".join(record["logs"])[-6000:]
    assert record["statuses"] == statuses, told
    for log, parts in zip(record["logs"], words, strict=True):
        assert [part for part in parts if part not in log] == [], told
        if STATUS in statuses and parts and name != "missing":
            assert "the last checkpoint is " in log or "njepa: the loader" in log or "Trace" in log
        assert "Traceback" not in log or "Traceback" in parts, told
    if statuses == [2, 2] and "images" not in name:
        assert not record["wrote"]
    # A killed one is noticed at once, a silent or still one after TIMEOUT; 5 s are left to ranks
    # that may end by the same error themselves.
    assert record["seconds"] < TIMEOUT + 8
