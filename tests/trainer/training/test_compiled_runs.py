"""Runs with compiled blocks or recomputed activations train as the plain ones do, and resume."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.jobs import make_images, run_jobs

STEPS = 12
# On 8x8 patches targets are 3x3, and context blocks 7x7 or 8x8: two shapes.
SHAPES = [
    "mask.static_shapes=true", "mask.context_scale=[0.8, 1.0]", "mask.target_scale=[0.2, 0.2]",
    "mask.aspect_ratio=[1.0, 1.0]",
]  # fmt: skip
BLOCKS, RECOMPUTE = "run.compile=blocks", "model.checkpoint_blocks=true"
FUSED = "model.fused_block=true"


def job(root, name, overrides, stage=0, folder=None, steps=STEPS):
    return {
        "name": name,
        "grads": steps < STEPS,
        "overrides": [
            f"data.path={root}/images", f"data.cache_dir={root}/cache",
            f"run.dir={root}/runs/{folder or name}", "method=ncjepa", f"run.max_steps={steps}",
            *overrides,
        ],
        "ds": {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 1.0,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    make_images(folder / "images", 26)
    return folder


@pytest.fixture(scope="module")
def compiled(root):
    """Runs of one process (which share compiled blocks), and one that a later process resumes."""
    first = run_jobs(
        [
            job(root, "blocks", [*SHAPES, BLOCKS]),
            job(root, "eager", SHAPES),
            job(root, "zero1", [*SHAPES, BLOCKS, RECOMPUTE], stage=1),
            job(root, "cut", [*SHAPES, BLOCKS, "run.stop_after=5"]),
        ],
        1,
        root / "first",
    )
    resumed = job(root, "resumed", [*SHAPES, BLOCKS, "run.resume=true"], folder="cut")
    return first | run_jobs([resumed], 1, root / "second")


def lines(root, run):
    return [json.loads(x) for x in (root / "runs" / run / "metrics.jsonl").open()]


@pytest.mark.slow
@pytest.mark.multirank
def test_compilations_stop_at_the_number_of_shapes(root, compiled):
    logged = [line.get("compilations") for line in lines(root, "blocks")]
    shapes = {(x["k_context"], x["k_target"]) for x in lines(root, "blocks")}
    contexts, queries = {c for c, _ in shapes}, {c + t for c, t in shapes}
    # The target encoder has one shape; both predictors, as wide as each other, share theirs, and
    # their only block is their last.
    assert len(shapes) == 2
    expected = 1 + len(contexts) + len(queries)
    counts = [count for count in logged if count is not None]
    assert counts == sorted(set(counts))  # a line where it grew
    assert counts[-1] == expected
    summary = json.loads((root / "runs/blocks/summary.json").read_text())
    assert (summary["compile"], summary["compilations"]) == ("blocks", expected)
    seen, grown = set(), []
    for line in lines(root, "blocks"):
        fresh = (line["k_context"], line["k_target"]) not in seen
        seen.add((line["k_context"], line["k_target"]))
        grown.append("compilations" in line)
        assert fresh or not grown[-1]
    assert not all(grown)
    eager = json.loads((root / "runs/eager/summary.json").read_text())
    assert (eager["compile"], eager["compilations"]) == ("off", 0)


@pytest.mark.slow
@pytest.mark.multirank
def test_compiled_losses_are_the_eager_ones_up_to_rounding(compiled):
    eager, blocks = (torch.tensor(compiled[name]["losses"]) for name in ("eager", "blocks"))
    assert len(eager) == STEPS
    # One rounding of fp32 is 6e-8; AdamW's division by tiny second moments makes more of it.
    torch.testing.assert_close(blocks, eager, rtol=2e-5, atol=0)
    assert (eager.diff().abs() > 1e-3).all()  # unlike steps that change nothing


@pytest.mark.slow
@pytest.mark.multirank
def test_zero_1_and_recomputed_activations_train_alike(compiled):
    blocks, zero1 = (torch.tensor(compiled[name]["losses"]) for name in ("blocks", "zero1"))
    torch.testing.assert_close(zero1, blocks, rtol=2e-5, atol=0)


@pytest.mark.slow
@pytest.mark.multirank
def test_a_resumed_compiled_run_is_the_run_that_was_not_stopped(compiled):
    assert compiled["cut"]["losses"] + compiled["resumed"]["losses"] == compiled["blocks"]["losses"]
    for name, tensor in compiled["blocks"]["target"].items():
        assert torch.equal(compiled["resumed"]["target"][name], tensor), name


@pytest.mark.slow
@pytest.mark.multirank
def test_recomputed_activations_give_the_same_bits_under_every_zero_stage(root):
    stages = (0, 1, 2, 3)
    records = run_jobs(
        [
            job(root, f"{name}{stage}", overrides, stage, steps=2)
            for stage in stages
            for name, overrides in (("kept", []), ("recomputed", [RECOMPUTE]))
        ],
        2,
        root / "two",
    )
    for stage in stages:
        kept, recomputed = records[f"kept{stage}"], records[f"recomputed{stage}"]
        assert recomputed["losses"] == kept["losses"]
        for a, b in zip(recomputed["grads"], kept["grads"], strict=True):
            assert a.keys() == b.keys()
            for name in a:
                assert torch.equal(a[name], b[name]), (stage, name)


@pytest.mark.slow
@pytest.mark.multirank
def test_fused_blocks_train_alike_also_where_zero_3_gathers_their_weights(root):
    variants = {
        "plain": ([], 0), "fused": ([FUSED], 0), "fused3": ([FUSED], 3),
        "fused-recomputed3": ([FUSED, RECOMPUTE], 3),
    }  # fmt: skip
    deep = ["model.depth=3", "model.predictor.depth=2"]
    records = run_jobs(
        [job(root, name, deep + own, stage, steps=4) for name, (own, stage) in variants.items()],
        2,
        root / "fused",
    )
    plain, *others = (torch.tensor(records[name]["losses"]) for name in variants)
    assert len(plain) == 4
    for losses in others:
        torch.testing.assert_close(losses, plain, rtol=2e-5, atol=0)
