"""A training step reads no device value on the host, but for what DeepSpeed does in its own step.

DeepSpeed looks whether the gradient norm is finite (ZeRO 1 to 3), builds a tensor for it, and one
for the limit of clipping: docs/performance.md, "Compilation".
"""

from __future__ import annotations

import pytest
import torch

from tests.support.host_reads import HostReads
from tests.support.jobs import make_images, run_jobs

JOBS = {
    "plain": (0, [], {}),
    "clipping": (0, [], {"gradient_clipping": 1.0}),
    "bf16-accumulated": (
        0, [], {"torch_autocast": {"enabled": True}, "gradient_accumulation_steps": 2},
    ),
    "everything": (
        0,
        ["noise.space=encoder_tied", "noise.mask_token=shared", "noise.draw=shared",
         "noise.consistency_stop=clean", "vicreg.on=context_vs_target", "mask.static_shapes=true",
         "model.checkpoint_blocks=true"],
        {},
    ),
    "one-predictor": (0, ["noise.predictors=shared", "noise.sigma=[1, 0.5, 0.25]"], {}),
    "single": (0, ["noise.predictors=single", "noise.sigma=edm"], {}),
    "zero1": (1, [], {"gradient_clipping": 1.0}),
    "zero1-no-clipping": (1, [], {}),
    "zero2": (2, [], {"gradient_clipping": 1.0}),
    "zero3": (3, [], {"gradient_clipping": 1.0}),
    "timed": (0, [], {"timers": {"throughput": {"enabled": True}}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    root = tmp_path_factory.mktemp("watched")
    make_images(root / "images", 26)
    jobs = [
        {
            "name": name,
            "watch": True,
            "overrides": [
                f"data.path={root}/images", f"data.cache_dir={root}/cache",
                f"run.dir={root}/{name}", "method=ncjepa", "run.max_steps=9", *overrides,
            ],
            "ds": {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}} | ds,
        }
        for name, (stage, overrides, ds) in JOBS.items()
    ]  # fmt: skip
    return run_jobs(jobs, 1, root / "jobs")


@pytest.mark.multirank
@pytest.mark.parametrize("name", JOBS)
def test_a_step_reads_nothing_on_the_host(watched, name):
    stage, _, ds = JOBS[name]
    seen = watched[name]["reads"]
    assert not [read for read in seen if " in deepspeed:" not in read]
    if stage == 0 and "gradient_clipping" not in ds:
        assert not seen


@pytest.mark.multirank
@pytest.mark.parametrize("name", JOBS)
def test_a_step_does_not_wait_for_the_device(watched, name):
    """DeepSpeed's throughput timer would, twice a micro-batch, from the third step on."""
    assert watched[name]["synchronized"] == (2 if name == "timed" else 0)


@pytest.mark.multirank
@pytest.mark.parametrize("name", JOBS)
def test_the_order_of_attention_is_set_once_a_step(watched, name):
    """And put back at its end: two steps, four settings, whatever number of calls."""
    within, outside = watched[name]["attended"]
    assert within >= 8  # in bf16 on a CPU only the target encoder's are SDPA
    assert outside == 0
    assert watched[name]["ordered"] == 4


def test_what_counts_as_a_read():
    """Each of these would make the host wait on a GPU, or copies from pageable memory."""
    x = torch.arange(6.0)
    mask = x > 2
    for read in (
        x[0].item, lambda: float(x[0]), lambda: bool(mask[0]), lambda: 1 if mask[0] else 0,
        x.tolist, x.nonzero, lambda: x[mask], lambda: x.masked_select(mask), x.unique,
        lambda: x.equal(x), x.numpy, x.cpu, lambda: torch.tensor([1.0]), lambda: 3.0 in x,
        lambda: range(int(x[3])), lambda: torch.bincount(x.long()),
    ):  # fmt: skip
        with HostReads() as reads:
            read()
        assert reads.seen
    with HostReads() as reads:
        (x * 2).clamp(min=0).sum().mul_(x.max())
        x[torch.arange(3)].index_add_(0, torch.zeros(3, dtype=torch.long), x[:3])
        torch.where(mask, x, 0.0)
    assert not reads.seen
