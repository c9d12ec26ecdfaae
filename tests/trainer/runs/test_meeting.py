"""Where ranks meet: a port that is taken, or that nobody named."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.support import program_env

JOIN = """
from njepa.config import ConfigError
from njepa.runs.ranks import join_ranks, leave_ranks
try:
    print("ranks", join_ranks("cpu", 20).world)
    leave_ranks()
except ConfigError as error:
    print("refused:", error)
"""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS")


def join(**launcher: str) -> str:
    plain = {name: value for name, value in program_env().items() if name not in LAUNCHED}
    return subprocess.run(
        [sys.executable, "-c", JOIN], capture_output=True, text=True, timeout=120, check=True,
        env=plain | launcher,
    ).stdout  # fmt: skip


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_one_rank_needs_no_port(taken):
    """The launcher of DeepSpeed gives every run the same one."""
    at = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken)}
    assert join(**at) == "ranks 1\n"
    assert join() == "ranks 1\n"


def test_a_taken_port_is_named_with_the_way_out(taken):
    at = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken)}
    said = join(**at)
    assert said.startswith(f"refused: rank 0 found 127.0.0.1:{taken} in use"), said
    assert f"--master_port {taken + 1}" in said


def test_several_ranks_without_a_place():
    said = join(RANK="0", WORLD_SIZE="2")
    assert said.startswith("refused: WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT"), said
