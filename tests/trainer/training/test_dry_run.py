"""``--dry-run``: says what a start would do, refuses what a start would refuse, touches nothing."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from njepa import train
from njepa.data.batch import Batch, Lengths, Masks
from njepa.runs.room import all_host_memory, host_memory
from njepa.training.masks_text import masks_text
from tests.support import ROOT, program_env
from tests.support.attempts import Attempts
from tests.support.jobs import TINY, make_images
from tests.support.written import flip


def tree(folder):
    """Every file and folder of ``folder`` with its content and time, but the cache's."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
        if "cache" not in path.relative_to(folder).parts
    }


@pytest.fixture(scope="module")
def attempts():
    process = Attempts()
    yield process
    process.close()


@pytest.fixture
def attempt(tmp_path, attempts):
    """A dry run in a folder with 12 images; returns (status, stdout, stderr)."""
    return calls(tmp_path, attempts)


@pytest.fixture
def here(tmp_path, capfd, monkeypatch):
    """The same in this process: for what is refused before DeepSpeed begins."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return calls(tmp_path, lambda _, *arguments: (train.main([*arguments]), *capfd.readouterr()))


def calls(folder, command):
    make_images(folder / "images", 12)
    (folder / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')

    def run(*overrides, options=("--dry-run",)):
        common = [*TINY, "data.path=images", "data.cache_dir=cache", "run.dir=runs/a"]
        before = tree(folder)
        found = command(folder, *options, *common, *overrides)
        if options:
            assert tree(folder) == before
        return found

    return run


@pytest.mark.slow
def test_what_it_says(attempt):
    status, said, err = attempt("method=ncjepa", "optim.epochs=4", "optim.warmup_epochs=1")
    assert status == 0, err
    table, masks = said.split("first masks")
    rows = dict(line.strip().split("  ", 1) for line in table.splitlines() if line)
    assert rows["batch"] == "effective 4 = 4 x 1 accumulated x 1 ranks"
    assert rows["steps"] == "0 of 3 done, 3 an epoch, 1 of warm-up"
    assert "encoder 0.03 M, predictor 0.0" in rows["parameters"]
    assert ", projector 0.0" in rows["parameters"]
    assert rows["micro-batch"].startswith("images 4 x 32 x 32 x 3 (uint8), context 4 x ")
    assert "sigma 4 x 4" in rows["micro-batch"]
    assert rows["first pass"].startswith("loss ")
    assert "a rank, predicted" in rows["memory"]
    assert rows["memory"].endswith(" free")
    assert rows["unreadable"] == "0 images left out of the index, 0 of the first that were read"
    grids = masks.split("\n\n")[1].splitlines()
    assert len(grids) == 8  # patches of 4 in 32 pixels
    assert {cell for line in grids for cell in line.split()} <= set("o1234+.")


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_run(attempt, tmp_path):
    _, said, _ = attempt()
    attempt("run.max_steps=1", "run.checkpoint_every=1", options=())
    line = json.loads((tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()[0])
    assert f"loss {line['loss']:.4f}, forward and backward" in said


@pytest.mark.slow
def test_a_run_in_the_folder(attempt, tmp_path):
    """Refused, or read as a resume would read it, but left as it is, damaged checkpoints too."""
    assert attempt("run.stop_after=2", "run.checkpoint_every=1", options=())[0] == 0
    left = tmp_path / "runs/a/checkpoints/.step-00000009.tmp"
    left.mkdir()
    status, said, err = attempt()
    assert (status, said) == (2, "")
    assert "runs/a already holds a run" in err
    status, said, _ = attempt("run.resume=true")
    assert status == 0
    assert "2 of 3 done" in said
    assert "from the run's checkpoint" in said
    status, _, err = attempt("run.resume=true", "optim.lr=1")
    assert status == 2
    assert "optim.lr: 0.003 -> 1.0" in err
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2}')
    status, _, err = attempt("run.resume=true")
    assert status == 2
    assert "was written with an effective batch of 4" in err
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    flip(tmp_path / "runs/a/checkpoints/step-00000002/shard-00000.safetensors")
    status, said, _ = attempt("run.resume=true")
    assert status == 0
    assert "1 of 3 done" in said
    with open(tmp_path / "runs/a/.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = attempt("run.resume=true")
    assert status == 2
    assert "in use by another process" in err


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_accumulation_and_stages(attempt, tmp_path, stage):
    ds = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    (tmp_path / "ds.json").write_text(json.dumps(ds | {"zero_optimization": {"stage": stage}}))
    status, said, err = attempt("method=cjepa")
    assert status == 0, err
    assert "effective 4 = 2 x 2 accumulated x 1 ranks" in said
    assert "images 2 x 32 x 32 x 3" in said
    assert "encoder 0.03 M" in said
    assert "first pass  loss" in said


@pytest.mark.slow
def test_ragged_contexts(attempt):
    status, said, err = attempt("mask.ragged=true")
    assert status == 0, err
    assert re.search(r"context \d+ x \d+ \(\d+ to \d+\), targets", said)
    assert "longer contexts, of mask.ragged, take more" in said


@pytest.mark.slow
def test_all_steps_done(attempt):
    assert attempt(options=())[0] == 0
    status, said, _ = attempt("run.resume=true")
    assert status == 0
    assert "none, all steps are done" in said
    assert "first masks" not in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.dir=ds.json/run"], "run.dir=ds.json/run cannot be written"),
        (["run.dir=/proc/run"], "run.dir=/proc/run cannot be written"),
        (["data.path=nowhere"], "data: nowhere does not exist"),
        (["data.path=few"], "the source has 2 images, but one step needs 4"),
        (["data.path=broken"], "none of the 4 images of"),
        (["model.init_from=ds.json"], "ds.json"),
        (["impl.default=triton"], "impl.default=triton"),
        (
            ["model.width=16384", "model.depth=900", "model.heads=64"],
            "need 57,985.9 GB a rank (1 in all)",
        ),
        (["run.tracker=trackio"], "is not installed: pip install trackio"),
        (["optim.epochs=1", "run.max_steps=null", "optim.warmup_epochs=3"], "9 warm-up steps of 3"),
        (["eval.online=true", "data.path=plain"], "eval.online=true needs labels"),
    ],
)
def test_what_a_start_would_refuse(here, tmp_path, overrides, message):
    make_images(tmp_path / "few", 2)
    make_images(tmp_path / "plain", 4, classes=1)
    make_images(tmp_path / "broken", 4)
    for path in (tmp_path / "broken").rglob("*.jpg"):
        path.write_bytes(b"no image")
    status, said, err = here(*overrides)
    assert (status, said) == (2, "")
    assert message in err
    assert len(err.splitlines()) < 12


@pytest.mark.slow
def test_a_batch_without_a_readable_image(attempt, tmp_path):
    make_images(tmp_path / "cut", 4)
    for path in (tmp_path / "cut").rglob("*.jpg"):  # what the index reads is right
        path.write_bytes(path.read_bytes()[:-60])
    status, said, err = attempt("data.path=cut")
    assert (status, said) == (2, "")
    assert "unreadable, and so is every image that could replace it" in err


@pytest.mark.slow
@pytest.mark.multirank
def test_two_ranks(attempt, tmp_path):
    attempt()  # the index is in the cache
    before = tree(tmp_path)
    ended = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(ROOT / "njepa/train.py"), "--ds_config", "ds.json", "--dry-run", *TINY,
            "method=cjepa", "data.path=images", "data.cache_dir=cache", "run.dir=runs/a",
        ],
        cwd=tmp_path, text=True, capture_output=True, timeout=300,
        env=program_env(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("effective 8 = 4 x 1 accumulated x 2 ranks") == 1
    assert ended.stdout.count("first masks") == 1
    assert "first pass  loss" in ended.stdout
    assert tree(tmp_path) == before


def test_masks_as_text():
    context = torch.tensor([[0, 1, 5, 0], [2, 3, 4, 5]])
    target = torch.tensor([[[1, 2], [2, 3]], [[0, 1], [0, 1]]])
    lengths = Lengths((3, 4), torch.tensor([3, 4]))
    images = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    batch = Batch(images, Masks(context, target, lengths), None, torch.tensor([7, 3]), 0)
    text = masks_text(batch, lambda i: f"image{i}.png", (2, 3))
    assert text.splitlines()[1:] == [
        "1: image7.png", "2: image3.png", "", "o 1 +    + + o", "2 . o    o o o",
    ]  # fmt: skip


def test_memory_of_a_container(tmp_path):
    free = host_memory(tmp_path)
    assert free > 1e6
    for name, content in (
        ("max", "3000\n"), ("current", "1000\n"), ("stat", "anon 5\ninactive_file 100\n"),
    ):  # fmt: skip
        (tmp_path / f"memory.{name}").write_text(content)
    assert host_memory(tmp_path) == 2100
    (tmp_path / "memory.max").write_text("max\n")
    assert np.isclose(host_memory(tmp_path), free, rtol=0.5)


def test_all_memory_of_a_container(tmp_path):
    host = all_host_memory(tmp_path)
    assert host > host_memory(tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    swap = all_host_memory(tmp_path) - 3000
    assert 0 <= swap < host
    (tmp_path / "memory.max").write_text("max\n")
    assert all_host_memory(tmp_path) == host
