"""The whole trainer: resume is exact, what it writes is complete, a stop loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from njepa.runs.signals import STOPPED
from tests.support import ROOT
from tests.support.jobs import TINY, make_images, run_jobs

STEPS = 6


#: One mask token that is a parameter of two predictors.
TWO_MODULES = ["noise.predictors=unshared", "noise.mask_token=shared"]


def job(root, name, overrides, stage, world, folder=None, accumulation=1):
    return {
        "name": name,
        "overrides": [
            f"data.path={root}/images", f"data.eval_path={root}/images",
            f"data.cache_dir={root}/cache", f"run.dir={root}/runs/{folder or name}",
            "method=ncjepa", f"run.max_steps={STEPS}", "eval.knn_k=3", *overrides,
        ],
        "ds": {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 1.0,
        },
    }  # fmt: skip


def interrupted(root, stage, world, accumulation=1, noise=()):
    """A run in one piece, and the same run stopped in the middle of its second epoch."""
    tag, more = f"w{world}-z{stage}", {"stage": stage, "world": world, "accumulation": accumulation}
    return [
        job(root, f"{tag}-whole", [*noise], **more),
        job(root, f"{tag}-first", [*noise, "run.stop_after=4"], folder=f"{tag}-cut", **more),
        job(root, f"{tag}-second", [*noise, "run.resume=true"], folder=f"{tag}-cut", **more),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    make_images(root / "images", 26)
    one_predictor = ["noise.predictors=shared", "noise.sigma=edm"]
    one = interrupted(root, 0, 1) + interrupted(root, 1, 1, accumulation=2, noise=one_predictor)
    two = interrupted(root, 3, 2, noise=TWO_MODULES)
    records = run_jobs(one, 1, root / "one") | run_jobs(two, 2, root / "two")
    return root / "runs", records


@pytest.mark.multirank
@pytest.mark.parametrize("tag", ["w1-z0", "w1-z1", "w2-z3"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(trained, tag):
    runs, records = trained
    whole, first, second = (records[f"{tag}-{part}"] for part in ("whole", "first", "second"))
    assert first["step"] == 4
    assert second["step"] == whole["step"] == STEPS
    assert first["losses"] + second["losses"] == whole["losses"]  # not approximately
    for name, tensor in whole["target"].items():
        assert torch.equal(second["target"][name], tensor), name
    lines = [read_metrics(runs / f"{tag}-{part}") for part in ("whole", "cut")]
    assert [x["step"] for x in lines[1]] == list(range(1, STEPS + 1))
    assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]


def read_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.multirank
def test_what_a_run_leaves(trained):
    runs, records = trained
    run = runs / "w1-z0-whole"
    expected = {
        "step", "epoch", "loss", "loss_clean", "loss_noise", "loss_consistency", "vicreg_inv",
        "vicreg_std", "vicreg_cov", "lr", "wd", "ema", "grad_norm", "k_context", "k_target",
        "feature_std", "rankme", "images_per_s", "data_wait_frac",
    }  # fmt: skip
    lines = read_metrics(run)
    assert expected <= lines[-1].keys()
    assert not any(key.startswith("loss_level") for key in lines[-1])
    assert all(x["grad_norm"] > 0 for x in lines)
    summary = json.loads((run / "summary.json").read_text())
    assert {
        "recipe", "method", "steps", "images_per_s", "loss_first", "loss_last", "knn_top1",
        "knn_top1_init", "knn_top1_pixels", "rankme", "device", "impl", "seconds",
    } <= summary.keys()  # fmt: skip
    assert summary["steps"] == STEPS
    assert summary["impl"]["vicreg"] in ("native", "reference")
    low, high = summary["knn_top1_ci95"]
    assert low <= summary["knn_top1"] <= high
    assert (run / "config.yaml").is_file()
    assert json.loads((run / "ds.json").read_text())["gradient_clipping"] == 1.0
    checkpoints = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert checkpoints == [f"step-{STEPS:08d}"]  # 26 images, batch 4: an epoch is 6 steps
    state = json.loads((run / "checkpoints" / checkpoints[0] / "state.json").read_text())
    assert state["step"] == STEPS
    assert len(state["data_digest"]) == 64
    target = load_file(run / "checkpoints" / checkpoints[0] / "target_encoder.safetensors")
    for name, tensor in records["w1-z0-whole"]["target"].items():
        assert torch.equal(target[name], tensor)


@pytest.mark.multirank
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_ends_cleanly(tmp_path, number):
    make_images(tmp_path / "images", 16)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    run = tmp_path / "run"
    command = [
        sys.executable, str(ROOT / "njepa/train.py"), "--ds_config", str(tmp_path / "ds.json"),
        *TINY, f"data.path={tmp_path}/images", f"data.cache_dir={tmp_path}/cache",
        f"run.dir={run}", "run.max_steps=100000", "run.checkpoint_every=100000", "run.device=cpu",
        "data.workers=1",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        process_group=0,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and len(read_metrics(run)) > 2:
            break
        time.sleep(0.1)
    os.killpg(process.pid, number)  # its loader process, too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, output
    assert "stopped after step" in output
    done = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{done:08d}" / "state.json").is_file()
    assert not (run / "summary.json").exists()


@pytest.mark.multirank
def test_an_image_that_cannot_be_read_is_named_and_the_steps_before_it_are_saved(tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    make_images(tmp_path / "images", 16)
    bad = tmp_path / "images/class1/0003.jpg"
    bad.write_bytes(bad.read_bytes()[:-150])
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2}')
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "njepa/train.py"), "--ds_config", str(tmp_path / "ds.json"),
            *TINY, f"data.path={tmp_path}/images", f"data.cache_dir={tmp_path}/cache",
            f"run.dir={tmp_path}/run", "run.max_steps=8", "run.device=cpu", "data.backend=dali",
            "data.on_error=stop",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "0003.jpg" in done.stderr
    assert "njepa scan" in done.stderr
    assert "Traceback" not in done.stderr
    steps = read_metrics(tmp_path / "run")
    if steps:  # the bad image is not in the very first batch
        saved = tmp_path / "run/checkpoints" / f"step-{steps[-1]['step']:08d}"
        assert (saved / "target_encoder.safetensors").is_file()
