"""Runs that start from the weights of another, under ZeRO 1 and 3 on two ranks."""

import shutil

import pytest
import torch

from njepa.exchange.reading import open_weights, read_encoder
from tests.support.jobs import make_images, run_jobs

STILL = ["optim.lr=1e-9", "optim.lr_start=1e-9", "optim.lr_final=1e-9", "optim.ema=[1.0, 1.0]"]


@pytest.mark.multirank
@pytest.mark.slow
def test_a_run_continues_another(tmp_path):
    make_images(tmp_path / "images", 16)
    first, moved = tmp_path / "first", tmp_path / "moved"
    common = [f"data.path={tmp_path / 'images'}", f"data.cache_dir={tmp_path / 'cache'}"]
    jobs = [("first", ["method=cjepa", f"run.dir={first}"], 1)]
    for stage in (1, 3):
        new = [
            f"run.dir={tmp_path / f'zero{stage}'}",
            f"model.init_from={first}",
            "method=njepa",
            "noise.predictors=unshared",
        ]
        jobs.append((f"zero{stage}", [*new, "run.stop_after=2", *STILL], stage))
    jobs.append(("larger", [f"run.dir={tmp_path / 'larger'}", f"model.init_from={first}",
                            "data.image_size=48", *STILL], 0))  # fmt: skip
    records = run_jobs([job(*parts, common) for parts in jobs], 2, tmp_path / "records")

    target, context = (read_encoder(first, which) for which in ("target", "context"))
    assert not torch.equal(target.state["norm.bias"], context.state["norm.bias"])
    for name in ("zero1", "zero3"):  # the target did not move from the first run's
        assert all(torch.equal(records[name]["target"][k], v) for k, v in target.state.items())
    given = open_weights(first).predictors()["predictor"]
    for run in ("zero1", "zero3"):
        for name, tensor in read_encoder(tmp_path / run, "context").state.items():
            torch.testing.assert_close(tensor, context.state[name], rtol=0, atol=1e-6)
        predictors = open_weights(tmp_path / run).predictors()
        for name in ("predictor", "noise_predictor"):  # the second is a copy of the only one
            for key, tensor in predictors[name].items():
                torch.testing.assert_close(tensor, given[key], rtol=0, atol=1e-6)
    larger = read_encoder(tmp_path / "larger", "target").state
    assert larger["pos_embed"].shape == (1, 144, 32)
    assert torch.equal(larger["blocks.0.mlp.fc1.weight"], target.state["blocks.0.mlp.fc1.weight"])

    shutil.move(first, moved)  # a resumed run does not read it again
    name, overrides, stage = jobs[1]
    record = run_jobs(
        [job(name, [*overrides[:-5], "run.resume=true", *STILL], stage, common)],
        2,
        tmp_path / "again",
    )
    assert record[name]["step"] == 3
    assert "weights  from the run's checkpoint" in (tmp_path / "again/rank0.log").read_text()


def job(name, overrides, stage, common):
    ds = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    return {"name": name, "overrides": [*common, *overrides], "ds": ds}
