"""A signal at any moment: what is saved, which status, and that the run can go on."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from njepa.runs.checkpoints import latest_checkpoint
from njepa.runs.signals import STEPS_LOST, STOPPED
from tests.support import program_env
from tests.support.jobs import TINY, make_images

pytestmark = pytest.mark.multirank

RESUME = "run.resume=true"
USR1, TERM = signal.SIGUSR1, signal.SIGTERM


def start(run, *more, moment=None, number=USR1, call=1):
    when = {"moment": moment, "number": int(number), "call": call} if moment else {}
    return {"run": run, "more": more, **when}


#: In this order; a run has the starts of its name.
STARTS = [
    start("set-up", moment="set-up"),
    start("set-up", RESUME),
    start("evaluation", "eval.every=2", moment="evaluation", number=TERM),
    start("evaluation", RESUME, moment="step"),
    start("last evaluation", moment="last evaluation"),
    start("last evaluation", RESUME),
    start("save", "run.checkpoint_every=2", moment="save"),
    start("stuck save", "run.checkpoint_every=2", "run.grace_s=1", moment="stuck save", call=2),
    start("asked for", "run.stop_after=2"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs, and statuses and output of the starts by run."""
    root = tmp_path_factory.mktemp("stops")
    make_images(root / "images", 16)
    (root / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    starts = []
    for number, one in enumerate(STARTS):
        name, more = one["run"], one["more"]
        arguments = [
            "--ds_config", str(root / "ds.json"), *TINY, f"data.path={root}/images",
            f"data.eval_path={root}/images", f"data.cache_dir={root}/cache",
            f"run.dir={root}/{name}", "run.max_steps=6", "run.device=cpu", "eval.knn_k=3", *more,
        ]  # fmt: skip
        when = {key: one[key] for key in one.keys() - {"run", "more"}}
        starts.append({"arguments": arguments, "log": str(root / f"{number}.log"), **when})
    (root / "starts.json").write_text(json.dumps(starts))
    command = [sys.executable, "-m", "tests.support.signalled_train", str(root / "starts.json")]
    done = subprocess.run(
        command, env=program_env(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ended = {}
    for one, told, status in zip(starts, STARTS, json.loads(done.stdout), strict=True):
        with open(one["log"]) as log:
            ended.setdefault(told["run"], []).append((status, log.read()))
    return root, ended


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_in_set_up(runs):
    (first, told), (second, _) = runs[1]["set-up"]
    assert (first, second) == (STOPPED, 0), told
    assert "SIGUSR1: saving and stopping, in 25 s at most" in told
    assert "stopped before the first step" in told


def test_in_an_evaluation_and_in_a_step(runs):
    root, ended = runs
    (first, told), (second, later) = ended["evaluation"]
    assert (first, second) == (STOPPED, STOPPED), told + later
    assert "stopped after step 3 of 6" in told  # the evaluation was after step 2
    assert "stopped after step 4 of 6" in later
    assert [line["step"] for line in lines(root / "evaluation")] == [1, 2, 3, 4]
    assert not any("knn_top1" in line for line in lines(root / "evaluation"))
    assert latest_checkpoint(root / "evaluation").name == "step-00000004"


def test_a_resume_makes_up_for_the_last_evaluation(runs):
    root, ended = runs
    (first, told), (second, later) = ended["last evaluation"]
    assert (first, second) == (STOPPED, 0), told + later
    assert "stopped in the evaluation" in told
    assert "summary.json" not in told
    summary = json.loads((root / "last evaluation/summary.json").read_text())
    assert summary["steps"] == 6
    assert "linear_top1" in summary


def test_in_a_save(runs):
    root, ended = runs
    [(status, told)] = ended["save"]
    assert status == STOPPED, told
    done = lines(root / "save")[-1]["step"]
    assert 2 < done < 6
    assert latest_checkpoint(root / "save").name == f"step-{done:08d}"
    assert list((root / "save/checkpoints").glob(".*")) == []


def test_a_save_that_takes_too_long(runs):
    root, ended = runs
    [(status, told)] = ended["stuck save"]
    assert status == STEPS_LOST, told
    last = latest_checkpoint(root / "stuck save")
    assert last.name == "step-00000002"
    lost = lines(root / "stuck save")[-1]["step"] - 2
    assert f"(run.grace_s); {lost} steps are lost, the last good checkpoint is {last}" in told


def test_a_stop_that_the_recipe_asks_for_is_the_end_of_the_command(runs):
    [(status, told)] = runs[1]["asked for"]
    assert status == 0, told
    assert "stopped after step 2 of 6" in told


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_step(runs, tmp_path):
    root, run = runs[0], tmp_path / "run"
    command = [
        sys.executable, "-m", "njepa.train", "--ds_config", f"{root}/ds.json", *TINY,
        f"data.path={root}/images", f"data.cache_dir={root}/cache", f"run.dir={run}",
        "run.max_steps=100000", "run.device=cpu", "run.checkpoint_every=100000",
    ]  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [tmp_path / f"rank{rank}.log" for rank in (0, 1)]
    ranks = []
    for rank, log in enumerate(logs):
        env = program_env(OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), **place)
        with open(log, "w") as file:
            ranks.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
    try:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").is_file() or len(lines(run)) < 3:
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            time.sleep(0.05)
        ranks[1].send_signal(USR1)
        told = [rank.wait(timeout=60) for rank in ranks], [log.read_text() for log in logs]
    finally:
        for rank in ranks:
            rank.kill()
    assert told[0] == [STOPPED, STOPPED], told
    done = lines(run)[-1]["step"]
    assert f"stopped after step {done} of" in told[1][0]
    assert latest_checkpoint(run).name == f"step-{done:08d}"
