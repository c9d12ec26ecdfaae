"""Two and four ranks train as one with the whole batch does, under ZeRO stages and methods."""

import pytest
import torch

from tests.support.jobs import make_images, run_jobs

pytestmark = pytest.mark.slow

#: A weight of 1 makes the VICReg terms visible in the gradients.
VICREG = "vicreg.weight=1.0"
RAGGED = ["mask.ragged=true", "vicreg.on=context_vs_target"]  # whose means leave the padding out
METHODS = {
    "ijepa": ["method=ijepa"],
    "cjepa": ["method=cjepa", VICREG],
    "cjepa-context": ["method=cjepa", VICREG, "vicreg.on=context_vs_target"],
    "njepa": ["method=njepa"],
    "ncjepa": ["method=ncjepa", VICREG],
    "ragged": ["method=ncjepa", VICREG, *RAGGED],
    # A parameter that belongs to two modules, and a module that is used for both predictions.
    "tied-token": ["method=njepa", "noise.mask_token=shared", "noise.draw=shared"],
    "one-predictor": ["method=njepa", "noise.predictors=shared", "noise.space=encoder_tied"],
}
STAGES = (0, 1, 2, 3)
GLOBAL_BATCH = 8
CASES = [(2, m, s) for m in METHODS for s in STAGES]
CASES += [(4, m, s) for m in ("cjepa", "cjepa-context") for s in (0, 2)]


def ds(world, stage, accumulation=1):
    return {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    make_images(root / "images", 20)

    def job(world, method, stage):
        name = f"{method}-{stage}"
        common = [f"data.path={root}/images", f"data.cache_dir={root}/cache{world}"]
        return {
            "name": name,
            "overrides": [f"run.dir={root}/runs/w{world}-{name}", *common, *METHODS[method]],
            "ds": ds(world, stage),
            "grads": True,
        }  # fmt: skip

    found = {1: run_jobs([job(1, m, 0) for m in METHODS], 1, root / "one")}
    for world in (2, 4):
        jobs = [job(world, m, s) for w, m, s in CASES if w == world]
        found[world] = run_jobs(jobs, world, root / f"ranks{world}")
    return found


@pytest.mark.multirank
@pytest.mark.parametrize(("world", "method", "stage"), CASES)
def test_ranks_equal_one(records, world, method, stage):
    one, two = records[1][f"{method}-0"], records[world][f"{method}-{stage}"]
    assert len(one["losses"]) == len(two["losses"]) == 3
    for ids_one, ids_two in zip(one["ids"], two["ids"], strict=True):
        assert sorted(ids_one.tolist()) == sorted(ids_two.tolist())
        assert len(set(ids_one.tolist())) == GLOBAL_BATCH
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-6)
    # Adam turns the rounding of gradients near 0 into whole steps, which grow with the ranks: only
    # the first gradients are of equal weights.
    steps = 3 if world == 2 else 1
    for grads_one, grads_two in zip(one["grads"][:steps], two["grads"][:steps], strict=True):
        assert grads_one.keys() == grads_two.keys()
        total = torch.stack([g.norm() for g in grads_one.values()]).norm()
        for name, expected in grads_one.items():
            error = (grads_two[name] - expected).norm()
            # fp32 rounding of sums in another order; a lost factor would be of the size of total.
            assert error <= 2e-5 * expected.norm() + 2e-6 * total, (name, error, expected.norm())
    for name, expected in one["target"].items() if world == 2 else ():
        got = two["target"][name]
        if name.endswith("qkv.bias"):
            # Softmax does not see the keys' bias: its gradient is pure rounding, which Adam
            # turns into full steps of either sign.
            expected, got = (torch.cat((x.chunk(3)[0], x.chunk(3)[2])) for x in (expected, got))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.multirank
def test_the_losses_are_worth_comparing(records):
    """Methods differ, steps differ, and every trained tensor has a gradient."""
    one = records[1]
    losses = {m: tuple(one[f"{m}-0"]["losses"]) for m in METHODS}
    assert len(set(losses.values())) == len(METHODS)
    for method in METHODS:
        assert len(set(losses[method])) == 3
        for name, grad in one[f"{method}-0"]["grads"][0].items():
            assert grad.abs().max() > 0, (method, name)
