"""CPU threads of ranks: shares of the cores, what a user sets, and what the start table says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from njepa.runs.threads import quota, share
from tests.support import ROOT, program_env
from tests.support.jobs import TINY, make_images


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((8, 8, None, 1), (8, "of 8 cores")),
        ((8, 8, None, 2), (4, "of 8 cores that 2 ranks share")),
        ((4, 8, None, 2), (2, "of 8 cores that 2 ranks share")),  # two hyperthreads a core
        ((2, 2, None, 8), (1, "of 2 cores that 8 ranks share")),
        ((64, 64, 2, 1), (2, "of 2 cores, the container's limit")),
        ((64, 64, 3, 2), (1, "of 3 cores, the container's limit that 2 ranks share")),
        ((2, 2, 16, 1), (2, "of 2 cores")),
    ],
)
def test_a_rank_gets_its_share_of_the_cores(given, expected):
    assert share(*given) == expected


def test_the_limit_of_a_container(tmp_path: Path):
    file = tmp_path / "cpu.max"
    assert quota(file) is None
    for text, cores in (
        ("max 100000", None),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("", None),
    ):
        file.write_text(text)
        assert quota(file) == cores


def start(rank: int, world: int, port: int, command: list[str], **env: str) -> subprocess.Popen:
    """A rank as a launcher that knows nothing of threads starts it."""
    given = program_env(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="", **env,
    )  # fmt: skip
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if name not in env:
            given.pop(name, None)
    return subprocess.Popen(
        [sys.executable, *command], env=given, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


JOIN = """
import os, sys, torch
if "BIND" in os.environ:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["RANK"])]})
from njepa.runs.ranks import join_ranks, leave_ranks
ranks = join_ranks("cpu")
print(torch.get_num_threads(), "|", ranks.threads)
leave_ranks()
"""
CORES = len(os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.skipif(CORES < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"BIND": "1"}, "1 | 1 (of 1 cores)"),
        ({"OMP_NUM_THREADS": "2"}, "2 | 2 (OMP_NUM_THREADS=2)"),
    ],
    ids=["bound", "as-the-user-says"],
)
def test_cores_of_their_own_and_the_users_number(env, expected):
    port = free_port()
    ranks = [start(rank, 2, port, ["-c", JOIN], **env) for rank in range(2)]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [text.splitlines()[-1] for text in said] == [expected] * 2, said


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_two_ranks_share_the_cores_and_say_so(tmp_path: Path):
    make_images(tmp_path / "images", 16)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2}')
    command = [
        str(ROOT / "njepa/train.py"), "--ds_config", str(tmp_path / "ds.json"), *TINY,
        f"data.path={tmp_path}/images", f"data.cache_dir={tmp_path}/cache",
        f"run.dir={tmp_path}/run", "run.max_steps=2", "run.device=cpu", "data.workers=1",
    ]  # fmt: skip
    port = free_port()
    ranks = [start(rank, 2, port, command) for rank in range(2)]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    limit = quota()
    cores = CORES if limit is None else min(limit, CORES)
    line = next(x for x in said[0].splitlines() if x.strip().startswith("threads "))
    assert "that 2 ranks share" in line
    assert int(line.split()[1]) <= cores // 2
