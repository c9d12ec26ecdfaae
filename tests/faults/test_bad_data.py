"""Whole trainings on sources with images that cannot be read, on one rank and on two."""

from __future__ import annotations

import json
import re

import pytest
import torch

from njepa.runs.checkpoints import all_checkpoints, checkpoint_step
from tests.support.jobs import make_images, run_jobs

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

IMAGES, BAD, STEPS = 100, "class1/0041.jpg", 60
PER_EPOCH = IMAGES // 4


def job(root, name, *overrides, folder=None, micro=4, accumulation=1, stage=0):
    ds = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
    }
    own = [
        f"data.path={root}/images", f"data.cache_dir={root}/cache",
        f"run.dir={root}/runs/{folder or name}", f"run.max_steps={STEPS}", "run.log_every=7",
        "run.checkpoint_every=1000", "data.workers=1", "method=ncjepa",
    ]  # fmt: skip
    return {"name": name, "overrides": [*own, *overrides], "ds": ds}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    root = tmp_path_factory.mktemp("bad")
    make_images(root / "images", IMAGES)
    bad = root / "images" / BAD
    bad.write_bytes(bad.read_bytes()[:-150])
    jobs = []
    for backend in ("torch", "dali"):
        use = f"data.backend={backend}"
        jobs += [
            job(root, f"skip-{backend}", use),
            job(root, f"first-{backend}", use, "run.stop_after=31", folder=f"cut-{backend}"),
            job(root, f"second-{backend}", use, "run.resume=true", folder=f"cut-{backend}"),
            job(root, f"stop-{backend}", use, "data.on_error=stop"),
            job(root, f"limit-{backend}", use, "data.max_bad_frac=0.005"),
        ]
    records = run_jobs(jobs, 1, root / "one")
    halves = [
        job(root, "stop-2", "data.on_error=stop", micro=2, stage=1),
        job(root, "amid-2", "data.on_error=stop", micro=1, accumulation=2),
        job(root, "skip-2", "data.max_bad_frac=0.011", micro=2),
        job(root, "limit-2", "data.max_bad_frac=0", micro=2, stage=3),
    ]
    return root / "runs", records | run_jobs(halves, 2, root / "two")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def times_met(records, name):
    """The bad sample, and the steps that meet it."""
    ids = records[name]["ids"]
    bad = int(next(i for i in sorted(torch.cat(ids).tolist()) if i == BAD_ID))
    return [step for step, seen in enumerate(ids) if bad in seen.tolist()]


#: Position of BAD among the sorted names: 50 of class0 come first.
BAD_ID = 50 + 20


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_skipped_images_are_counted_and_a_resume_is_exact(trained, backend):
    runs, records = trained
    whole, cut = records[f"skip-{backend}"], records[f"second-{backend}"]
    met = times_met(records, f"skip-{backend}")
    assert len(met) >= 2
    assert "error" not in whole
    for run in (runs / f"skip-{backend}", runs / f"cut-{backend}"):
        counted = {line["step"]: line.get("skipped_images", 0) for line in lines(run)}
        before = 0
        for step, count in counted.items():
            assert count == sum(before <= m < step for m in met)
            before = step
        assert json.loads((run / "summary.json").read_text())["skipped_images"] == len(met)
    assert cut["losses"] == whole["losses"][31:]
    assert all(torch.equal(cut["target"][k], v) for k, v in whole["target"].items())


def test_both_backends_train_alike(trained):
    _, records = trained
    ours, theirs = records["skip-torch"], records["skip-dali"]
    assert torch.equal(torch.cat(ours["ids"]), torch.cat(theirs["ids"]))
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=0.01, atol=0)
    clean = records["limit-torch"]
    assert clean["losses"] == ours["losses"][: len(clean["losses"])]


@pytest.mark.parametrize("name", ["stop-torch", "stop-dali", "stop-2"])
def test_stop_ends_every_rank_before_the_step_and_saves(trained, name):
    runs, records = trained
    (step, *_), record = times_met(records, "skip-torch"), records[name]
    assert record["step"] == step == len(record["losses"])
    assert [checkpoint_step(path) for path in all_checkpoints(runs / name)] == [step]
    assert re.match(rf"(rank \d: )?unreadable: {BAD} \(.*truncated.*on_error=stop", record["error"])
    assert "njepa scan" in record["error"]


def test_in_the_middle_of_a_step_the_last_checkpoint_stands(trained):
    runs, records = trained
    record = records["amid-2"]
    assert f"unreadable: {BAD}" in record["error"]
    assert record["step"] == times_met(records, "skip-torch")[0]
    assert all_checkpoints(runs / "amid-2") == []


@pytest.mark.parametrize("name", ["limit-torch", "limit-dali", "limit-2"])
def test_too_many_bad_images_end_every_rank_at_a_log_line(trained, name):
    runs, records = trained
    step = times_met(records, "skip-torch")[0]
    record, due = records[name], (step // 7 + 1) * 7
    assert record["step"] == due
    assert [checkpoint_step(path) for path in all_checkpoints(runs / name)] == [due]
    assert "1 of the 100 images of" in record["error"]
    assert BAD in record["error"]
    assert "raise data.max_bad_frac" in record["error"]
    assert lines(runs / name)[-1]["skipped_images"] == 1


def test_an_image_that_both_ranks_have_met_counts_once(trained):
    runs, records = trained
    assert "error" not in records["skip-2"]
    assert records["skip-2"]["step"] == STEPS
    summary = json.loads((runs / "skip-2/summary.json").read_text())
    assert summary["skipped_images"] == len(times_met(records, "skip-torch"))
