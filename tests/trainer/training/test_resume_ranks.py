"""A run goes on with other ranks and another ZeRO stage: the same state, samples and losses."""

from __future__ import annotations

import shutil

import pytest

from tests.support.jobs import make_images, run_jobs
from tests.support.written import differences

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

STEPS, STOP, BATCH = 4, 2, 8  # 26 images: an epoch is 3 steps
METHODS = ("ijepa", "cjepa", "njepa", "ncjepa")
PRECISIONS = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True}},
    "bf16": {"bf16": {"enabled": True}},
}
#: Under each stage, with the method that is numbered as the stage.
SAME = [(s, p) for s in range(4) for p in PRECISIONS if (s, p) != (0, "bf16")]
#: Ranks and stage before, ranks and stage after.
CHANGES = [
    *((2, stage, 1, stage) for stage in range(4)),
    *((1, stage, 2, stage) for stage in range(4)),
    (2, 0, 1, 3), (2, 3, 1, 0), (1, 1, 2, 2), (1, 2, 2, 3), (2, 2, 2, 0), (2, 3, 2, 1),
    (2, 1, 4, 1), (2, 3, 4, 3), (2, 0, 4, 2),
]  # fmt: skip


def job(root, name, stage, world, *overrides, method=None, precision="fp32", save=False):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
    return {
        "name": name,
        "overrides": [
            f"data.path={root}/images", f"data.cache_dir={root}/cache",
            f"run.dir={root}/runs/{name}", f"method={method or METHODS[stage]}",
            f"run.max_steps={STEPS}", f"run.checkpoint_every={STOP}", "run.keep_checkpoints=9",
            *overrides,
        ],
        "ds": {
            "train_micro_batch_size_per_gpu": BATCH // world, "zero_optimization": zero,
            **PRECISIONS[precision],
        },
        "save": save, "slow_copy": True,
    }  # fmt: skip


def checkpoint(root, name, step=STEPS):
    return root / "runs" / name / "checkpoints" / f"step-{step:08d}"


def stopped(root, source, name):
    """A copy of a run as it was after ``STOP`` steps."""
    shutil.copytree(root / "runs" / source, root / "runs" / name)
    shutil.rmtree(checkpoint(root, name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Records by name: whole runs, and runs that go on from a copy of one."""
    root = tmp_path_factory.mktemp("resume")
    make_images(root / "images", 26)
    records = {}
    for world in (1, 2):
        wholes = [job(root, f"{world}-{s}-{p}", s, world, precision=p) for s, p in SAME]
        records |= run_jobs(wholes, world, root / f"ranks{world}")
    for world in (1, 2, 4):
        jobs = []
        for stage, precision in SAME if world < 4 else ():
            name = f"{world}-{stage}-{precision}"
            stopped(root, name, f"{name}-on")
            jobs.append(job(root, f"{name}-on", stage, world, "run.resume=true",
                            precision=precision))  # fmt: skip
        for before, old, after, new in CHANGES:
            if after == world:
                name = f"{before}-{old}-to-{after}-{new}"
                stopped(root, f"{before}-{old}-fp32", name)
                jobs.append(job(root, name, new, world, "run.resume=true", method=METHODS[old],
                                save=True))  # fmt: skip
        records |= run_jobs(jobs, world, root / f"resumed{world}")
    return root, records


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), SAME)
def test_the_same_ranks_and_stage_give_the_same_bits(runs, world, stage, precision):
    root, records = runs
    name = f"{world}-{stage}-{precision}"
    whole, on = records[name], records[f"{name}-on"]
    assert len(on["losses"]) == STEPS - STOP
    assert on["losses"] == whole["losses"][STOP:]
    assert differences(checkpoint(root, name), checkpoint(root, f"{name}-on")) == []


@pytest.mark.parametrize(("before", "old", "after", "new"), CHANGES)
def test_other_ranks_and_stages_have_the_same_state(runs, before, old, after, new):
    """What they loaded and wrote again, bit for bit: weights, moments, counts, buffers, target."""
    root, _ = runs
    first = checkpoint(root, f"{before}-{old}-fp32", STOP)
    again = checkpoint(root, f"{before}-{old}-to-{after}-{new}", STOP)
    assert differences(first, again) == []
    shards = [len(list(path.glob("shard-*"))) for path in (first, again)]
    assert shards == [before, after]


@pytest.mark.parametrize(("before", "old", "after", "new"), CHANGES)
def test_other_ranks_and_stages_go_on_alike(runs, before, old, after, new):
    _, records = runs
    whole = records[f"1-{old}-fp32"]
    on = records[f"{before}-{old}-to-{after}-{new}"]
    for ids, expected in zip(on["ids"], whole["ids"][STOP:], strict=True):
        assert sorted(ids.tolist()) == sorted(expected.tolist())
    # Other crops, masks or noise would differ in the first or second digit.
    assert on["losses"] == pytest.approx(whole["losses"][STOP:], rel=2e-5)


def test_the_comparison_sees_a_bit(runs):
    root, _ = runs
    assert differences(checkpoint(root, "1-0-fp32"), checkpoint(root, "1-0-autocast"))
