"""On one rank nothing is reduced: DeepSpeed moves fewer bytes, and every number stays the same."""

from __future__ import annotations

import pytest
import torch

from tests.support.jobs import make_images, run_jobs

pytestmark = pytest.mark.slow

#: ZeRO sections: as the trainer completes them on one rank, and as DeepSpeed takes them on many.
#: Stage 3 last: it replaces torch's ``linear`` in the whole process.
JOBS = {
    f"zero{stage}{name}": {"stage": stage, **section}
    for stage in range(4)
    for name, section in (("", {}), ("-as-with-many", {"reduce_scatter": True}))
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("one-rank")
    make_images(root / "images", 18)
    jobs = [
        {
            "name": name,
            "moved": True,
            "reduce": zero == {"stage": 0, "reduce_scatter": True},
            "overrides": [
                f"data.path={root}/images", f"data.cache_dir={root}/cache",
                f"run.dir={root}/{name}", "method=ncjepa",
            ],
            "ds": {
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 1.0,
                "torch_autocast": {"enabled": True},
                "zero_optimization": zero,
            },
        }
        for name, zero in JOBS.items()
    ]  # fmt: skip
    return run_jobs(jobs, 1, root / "jobs")


@pytest.mark.multirank
@pytest.mark.parametrize("stage", range(4))
def test_the_same_bits(runs, stage: int):
    ours, theirs = runs[f"zero{stage}"], runs[f"zero{stage}-as-with-many"]
    assert len(ours["losses"]) == 6
    assert ours["losses"] == theirs["losses"]
    for name, tensor in theirs["target"].items():
        assert torch.equal(ours["target"][name], tensor), name


def passes(run) -> float:
    """Bytes that DeepSpeed moves in the backward of a step, over those of the gradients."""
    steps, moved = 3, sum(run["moved"]["moved"].values())
    return round(moved / steps / run["moved"]["gradients"], 3)


@pytest.mark.multirank
@pytest.mark.parametrize("stage", range(4))
def test_fewer_bytes(runs, stage: int):
    ours, theirs = runs[f"zero{stage}"], runs[f"zero{stage}-as-with-many"]
    assert passes(ours) < passes(theirs)


@pytest.mark.multirank
def test_zero_0_reduces_nothing(runs):
    """As with many ranks it copies all gradients together and back: four passes and a reduction.

    Every parameter must have a gradient, though: where one has none the reduction would put zeros,
    and AdamW then decay the weight.
    """
    ours, theirs = runs["zero0"]["moved"], runs["zero0-as-with-many"]["moved"]
    assert (passes(runs["zero0"]), ours["reduced"]) == (0, 0)
    assert passes(runs["zero0-as-with-many"]) == 4
    assert theirs["reduced"] == 3 * theirs["gradients"]
    assert ours["without"] == []
