"""``eval.online``: a run with it is, bit for bit, the run without."""

import json

import pytest
import torch

from njepa.config import ConfigError, load_config
from njepa.data.sources import open_source
from njepa.evaluation.online import follow_run
from tests.support.jobs import make_images, run_jobs

STEPS = 6


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 2)])
def test_a_run_does_not_notice(tmp_path, world, stage):
    make_images(tmp_path / "images", 26)

    def job(online):
        return {
            "name": str(online),
            "overrides": [
                f"data.path={tmp_path}/images", f"data.cache_dir={tmp_path}/cache",
                f"run.dir={tmp_path}/runs/{online}", "method=ncjepa", f"run.max_steps={STEPS}",
                f"eval.online={str(online).lower()}",
            ],
            "ds": {
                "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
            },
            "features": True,
        }  # fmt: skip

    records = run_jobs([job(False), job(True)], world, tmp_path / "work")
    without, with_probe = records["False"], records["True"]
    assert with_probe["losses"] == without["losses"]  # not approximately
    assert len(with_probe["losses"]) == STEPS
    for part in ("target", "online"):
        for name, tensor in without[part].items():
            assert torch.equal(with_probe[part][name], tensor), (part, name)
    keys = {"online_linear_top1", "online_knn_top1"}
    lines = {
        name: [json.loads(x) for x in (tmp_path / "runs" / name / "metrics.jsonl").open()]
        for name in records
    }
    assert any(keys <= line.keys() for line in lines["True"])
    assert not any(keys & line.keys() for line in lines["False"])
    for line in lines["True"]:
        assert all(0 <= line[key] <= 100 for key in keys & line.keys())


def test_it_needs_labels(tmp_path):
    make_images(tmp_path / "images", 4, classes=1)
    config = load_config("shapes-tiny", [f"data.path={tmp_path}/images", "eval.online=true"])
    index = open_source(tmp_path / "images", tmp_path / "cache", progress=False)
    with pytest.raises(ConfigError, match=r"eval.online=true needs labels.*unset eval.online"):
        follow_run(config, index, torch.device("cpu"))
    assert follow_run(load_config("shapes-tiny", []), index, torch.device("cpu")) is None
