"""``eval.which``: the right encoder under the right keys, and a training that does not notice."""

import json

import pytest
import torch

from njepa.config import load_config
from njepa.data.sources import open_source
from njepa.evaluation.features import pooled_features
from njepa.evaluation.images import load_split
from njepa.models.encoder import build_encoder
from tests.support.jobs import TINY, make_images, run_jobs

pytestmark = pytest.mark.slow

STEPS = 6
#: Ranks and ZeRO stage; the runs of each.
RUNS = {
    (1, 0): ("none", "target", "context", "both"),
    (1, 3): ("none", "both"),
    (2, 3): ("none", "both"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("which")
    make_images(root / "images", 26)

    def job(world, stage, which):
        name = f"w{world}-z{stage}-{which}"
        evaluated = [f"data.eval_path={root}/images", "eval.every=2", f"eval.which={which}"]
        return {
            "name": name,
            "overrides": [
                f"data.path={root}/images", f"data.cache_dir={root}/cache",
                f"run.dir={root}/runs/{name}", "method=ncjepa", f"run.max_steps={STEPS}",
                "eval.knn_k=3", *(evaluated if which != "none" else []),
            ],
            "ds": {
                "train_micro_batch_size_per_gpu": 4,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
            "features": True,
        }  # fmt: skip

    records = {}
    for ranks in (1, 2):
        jobs = [job(*key, which) for key, runs in RUNS.items() for which in runs if key[0] == ranks]
        records |= run_jobs(jobs, ranks, root / f"{ranks}")
    return root, records


@pytest.mark.multirank
@pytest.mark.parametrize(("world", "stage"), RUNS)
def test_evaluation_leaves_the_training_bit_identical(trained, world, stage):
    _, records = trained
    none = records[f"w{world}-z{stage}-none"]
    for which in RUNS[world, stage][1:]:
        run = records[f"w{world}-z{stage}-{which}"]
        assert run["losses"] == none["losses"]  # not approximately
        assert len(run["losses"]) == STEPS
        for part in ("target", "online"):
            for name, tensor in none[part].items():
                assert torch.equal(run[part][name], tensor), (which, part, name)


@pytest.mark.multirank
@pytest.mark.parametrize(("world", "stage"), RUNS)
def test_the_features_are_those_of_the_two_encoders(trained, world, stage):
    """Recomputed outside of the trainer, from the weights that DeepSpeed hands out."""
    root, records = trained
    record = records[f"w{world}-z{stage}-both"]
    config = load_config("shapes-tiny", [*TINY, f"data.path={root}/images"])
    index = open_source(root / "images", root / "cache", progress=False)
    images = load_split(index, 1000, config.data.image_size, 0, index.labels)
    prefix = "jepa.encoder."
    online = {k.removeprefix(prefix): v for k, v in record["online"].items() if prefix in k}
    frozen = {"pos_embed": record["target"]["pos_embed"]}
    expected = []
    for weights in (record["target"], online | frozen):
        encoder = build_encoder(config).eval()
        encoder.load_state_dict(weights)
        expected.append(pooled_features(encoder, images, config, torch.device("cpu")))
    target, context, _untrained = record["features"][-3:]
    torch.testing.assert_close(target, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(context, expected[1], rtol=1e-5, atol=1e-5)
    assert (target - context).abs().max() > 1e-2  # so that a mix-up would show


def read(root, name):
    run = root / "runs" / name
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "summary.json").read_text()), lines


@pytest.mark.multirank
@pytest.mark.parametrize(("world", "stage"), RUNS)
def test_both_are_reported_during_the_run_and_at_its_end(trained, world, stage):
    summary, lines = read(trained[0], f"w{world}-z{stage}-both")
    assert summary["eval_which"] == "both"
    keys = {f"{k}{s}{c}" for k in ("knn_top1", "linear_top1") for s in ("", "_context")
            for c in ("", "_ci95")}  # fmt: skip
    assert keys <= summary.keys()
    scored = [line for line in lines if "knn_top1" in line]
    assert [line["step"] for line in scored] == [2, 4]  # the last one is in the summary
    knn = {key for key in keys if key.startswith("knn")}
    assert all(line.keys() == {"step", *knn} for line in scored)


@pytest.mark.multirank
def test_one_encoder_alone_has_the_plain_keys(trained):
    root, records = trained
    both, _ = read(root, "w1-z0-both")
    target, context, _untrained = records["w1-z0-both"]["features"][-3:]
    features = {"target": target, "context": context}
    for which, suffix in (("target", ""), ("context", "_context")):
        alone, lines = read(root, f"w1-z0-{which}")
        assert alone["eval_which"] == which
        assert not any(key.endswith("_context") for key in alone)
        assert not any("knn_top1_context" in line for line in lines)
        for key in ("knn_top1", "linear_top1"):
            assert alone[key] == both[f"{key}{suffix}"]
            assert alone[f"{key}_ci95"] == both[f"{key}{suffix}_ci95"]
        assert torch.equal(records[f"w1-z0-{which}"]["features"][-2], features[which])
    none, _ = read(root, "w1-z0-none")
    assert not any(key.startswith(("knn", "linear")) for key in none)
