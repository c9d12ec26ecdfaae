"""A run goes on with other ranks and another ZeRO stage: the same state, samples and losses."""

from __future__ import annotations

import shutil

import pytest

from tests.support.jobs import make_images, run_jobs
from tests.support.written import differences

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

STEPS, STOP, BATCH = 5, 2, 8
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


def job(root, name, stage, world, *overrides, folder=None, precision="fp32", save=False):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
    return {
        "name": name,
        "overrides": [
            f"data.path={root}/images", f"data.cache_dir={root}/cache",
            f"run.dir={root}/runs/{folder or name}", f"method={METHODS[stage]}",
            f"run.max_steps={STEPS}", *overrides,
        ],
        "ds": {
            "train_micro_batch_size_per_gpu": BATCH // world, "zero_optimization": zero,
            **PRECISIONS[precision],
        },
        "save": save,
    }  # fmt: skip


def final(root, name, step=STEPS):
    return root / "runs" / name / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Records by name. Every change starts from a copy of the run that stopped."""
    root = tmp_path_factory.mktemp("resume")
    make_images(root / "images", 26)
    records = {}
    for world in (1, 2):
        jobs = []
        for stage, precision in SAME:
            name = f"{world}-{stage}-{precision}"
            jobs += [
                job(root, name, stage, world, precision=precision),
                job(root, f"{name}-cut", stage, world, f"run.stop_after={STOP}",
                    precision=precision),
                job(root, f"{name}-on", stage, world, "run.resume=true", folder=f"{name}-cut",
                    precision=precision),
            ]  # fmt: skip
        jobs += [job(root, f"{world}-{s}", s, world, f"run.stop_after={STOP}") for s in range(4)]
        records |= run_jobs(jobs, world, root / f"ranks{world}")
    for world in (1, 2, 4):
        jobs = []
        for before, old, after, new in CHANGES:
            if after == world:
                name = f"{before}-{old}-to-{after}-{new}"
                shutil.copytree(root / "runs" / f"{before}-{old}", root / "runs" / name)
                # The method stays that of the old stage.
                jobs.append(job(root, name, new, world, f"method={METHODS[old]}",
                                "run.resume=true", save=True))  # fmt: skip
        records |= run_jobs(jobs, world, root / f"changed{world}")
    return root, records


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), SAME)
def test_the_same_ranks_and_stage_give_the_same_bits(runs, world, stage, precision):
    root, records = runs
    name = f"{world}-{stage}-{precision}"
    whole, cut, on = (records[f"{name}{part}"] for part in ("", "-cut", "-on"))
    assert cut["losses"] + on["losses"] == whole["losses"]
    assert differences(final(root, name), final(root, f"{name}-cut")) == []


@pytest.mark.parametrize(("before", "old", "after", "new"), CHANGES)
def test_other_ranks_and_stages_have_the_same_state(runs, before, old, after, new):
    """What they loaded and wrote again, bit for bit: weights, moments, counts, buffers, target."""
    root, _ = runs
    first = final(root, f"{before}-{old}", STOP)
    assert differences(first, final(root, f"{before}-{old}-to-{after}-{new}", STOP)) == []


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
    assert differences(final(root, "1-0-fp32"), final(root, "1-0-autocast"))
