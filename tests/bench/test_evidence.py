"""The ablations: keys, resuming, failures, intervals, and real runs of a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from bench.evidence import cache, report, runs, worker
from bench.evidence.cache import Task, finished, load, save, tasks_of
from bench.evidence.tables import BASE, IJEPA, NJEPA, RECIPE, SIGMA, TABLES, Arm, Table
from bench.evidence.worker import thin
from njepa.config import dump_config, load_config

TASK = Task("a", {**BASE, **NJEPA}, 0)


# Keys


def test_the_key_is_the_same_in_another_process_and_for_another_order_of_the_overrides() -> None:
    backwards = Task("b", dict(reversed(list(TASK.overrides.items()))), 0)
    assert backwards.key == TASK.key
    code = (
        "from bench.evidence.cache import Task; from bench.evidence.tables import BASE, NJEPA\n"
        "print(Task('a', {**BASE, **NJEPA}, 0).key)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cache.ROOT, check=True
    )
    assert done.stdout.strip() == TASK.key


def test_the_key_changes_with_all_that_decides_the_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def changed(**overrides: Any) -> str:
        named = {k.replace("_", ".", 1): v for k, v in overrides.items()}
        return Task("a", {**TASK.overrides, **named}, 0).key

    keys = {
        TASK.key,
        Task("a", TASK.overrides, 1).key,
        Task("a", TASK.overrides, 0, floors=True).key,
        changed(run_max_steps=513),
        changed(noise_sigma=0.75),
        changed(ds_gradient_clipping=0.5),
        changed(optim_lr=1e-3),
    }
    recipe = cache._recipe()
    monkeypatch.setattr(cache, "_recipe", lambda: {**recipe, "optim.lr": 1.0})
    keys.add(TASK.key)
    monkeypatch.setattr(cache, "_recipe", lambda: recipe)
    (tmp_path / "ds.json").write_text('{"train_batch_size": 32}')
    monkeypatch.setattr(cache, "DS_CONFIG", tmp_path / "ds.json")
    keys.add(TASK.key)
    assert len(keys) == 9


def test_what_an_arm_overrides_and_what_decides_nothing_is_not_in_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = TASK.key
    recipe = {**cache._recipe(), "noise.weight": 7, "run.log_every": 3, "eval.every": 9}
    monkeypatch.setattr(cache, "_recipe", lambda: recipe)
    assert TASK.key == before


class Read(Exception):
    pass


def test_every_cpu_trains_them_in_fp32_under_the_same_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ds.json says auto, which a CPU with matrix units may take for bf16."""

    def load(path: Path) -> None:
        read.append(json.loads(path.read_text()))
        raise Read

    key, read = TASK.key, list[dict[str, Any]]()
    monkeypatch.setattr(worker, "load_deepspeed_file", load)
    for task in (TASK, Task("b", {**TASK.overrides, "ds.torch_autocast": {"enabled": True}}, 0)):
        with pytest.raises(Read):
            worker._train(task, Any, Any, tmp_path / "run")  # type: ignore[arg-type]
    assert TASK.ds["torch_autocast"]["enabled"] == "auto"
    assert read[0] == {**TASK.ds, "torch_autocast": {"enabled": False, "dtype": "bfloat16"}}
    assert read[1]["torch_autocast"] == {"enabled": True}  # an arm's own
    assert TASK.key == key


# Tables


def test_every_arm_is_a_valid_configuration_with_the_values_it_asks_for(tmp_path: Path) -> None:
    for task in tasks_of(TABLES, [0]):
        config = load_config(RECIPE, task.arguments(tmp_path))
        resolved = cache._flat(yaml.safe_load(dump_config(config)))
        for name, value in task.asked.items():
            assert resolved[name] == value, f"{task.name}: {name}"


def test_arms_of_two_tables_run_once_and_the_first_seed_of_all_arms_comes_first() -> None:
    tasks = tasks_of(TABLES, [0, 1, 2])
    arms = {str({**table.base, **arm.overrides}) for table in TABLES for arm in table.arms}
    each = len(arms) + 1  # the floors
    assert each < 1 + sum(len(table.arms) for table in TABLES)
    assert len({task.key for task in tasks}) == len(tasks) == 3 * each
    assert [task.seed for task in tasks] == [0] * each + [1] * each + [2] * each
    assert [t.seed for t in tasks if t.floors] == [0, 1, 2]


def test_a_table_needs_its_baseline_and_names_of_its_own() -> None:
    with pytest.raises(ValueError, match="baseline 'b'"):
        Table("t", "T", "", (Arm("a", IJEPA),), baseline="b")
    with pytest.raises(ValueError, match="names of their own"):
        Table("t", "T", "", (Arm("a", IJEPA), Arm("a", NJEPA)), baseline="a")


# Report


def test_intervals_are_those_of_student() -> None:
    assert report.mean([]) is None
    one = report.mean([3.0])
    assert one is not None
    assert (one.value, one.half, str(one)) == (3.0, None, "3.0")
    three = report.mean([1.0, 2.0, 3.0])  # s = 1: 4.303 / sqrt(3)
    assert three is not None
    assert (three.value, three.half) == (2.0, pytest.approx(2.48434, abs=1e-4))
    assert (str(three), three.signed) == ("2.0 ± 2.5", "+2.0 ± 2.5")
    two = report.mean([10.0, 12.0])  # s = sqrt(2): 12.706 * sqrt(2) / sqrt(2)
    assert two is not None
    assert two.half == pytest.approx(12.706)


def test_verdicts_follow_from_the_interval_alone() -> None:
    assert report.verdict(report.mean([1.0, 2.0, 3.0])) == "undecided"
    assert report.verdict(report.mean([1.9, 2.0, 2.1])) == "better"
    assert report.verdict(report.mean([-1.9, -2.0, -2.1])) == "worse"
    assert report.verdict(report.mean([5.0])) == "undecided"
    assert report.verdict(None) == "undecided"


def record(knn: float, linear: float) -> dict[str, Any]:
    return {
        "status": "done",
        "scores": {"knn_top1": knn, "linear_top1": linear},
        "feature_std": 0.5,
        "rankme": 20.0,
        "seconds": {"set_up": 1.0, "train": 8.0, "evaluate": 1.0},
        "curve": {"step": [1, 2], "loss": [0.5, 0.4], "feature_std": [0.5, 0.3]},
        "date": "2026-11-24",
        "machine": {"device": "some CPU", "threads": 1, "torch": "2.14"},
    }


def test_the_table_pairs_seeds_and_shows_losing_failed_and_missing_runs(tmp_path: Path) -> None:
    arms = (Arm("base", IJEPA), Arm("arm", NJEPA), Arm("bad", {**NJEPA, "noise.sigma": 9}))
    table = Table("t", "A title", "66.8.", arms, baseline="base", verdict="Undecided.")

    def task(arm: int, seed: int) -> Task:
        return Task("x", {**BASE, **arms[arm].overrides}, seed)

    for seed, score in enumerate((60.0, 70.0, 80.0)):  # seeds differ more than arms
        save(task(0, seed), record(score, 50.0), tmp_path)
        save(task(1, seed), record(score - 2 + 0.1 * seed, 50.0 + seed), tmp_path)
    save(task(2, 0), {"status": "failed", "error": "NonFiniteLoss: nan"}, tmp_path)
    floor = Task("untrained", IJEPA, 0, floors=True)
    scores = {"knn_top1_init": 25.0, "linear_top1_init": 40.0, "knn_top1_pixels": 36.0}
    save(floor, {"status": "done", "scores": scores}, tmp_path)

    text = report.document([table], [0, 1, 2], folder=tmp_path)
    # differences -2.0, -1.9, -1.8: mean -1.9, s .1; linear 0, 1, 2: mean 1, s 1
    assert (
        "| arm | 68.1 ± 25.1 | 51.0 ± 2.5 | -1.9 ± 0.2 | +1.0 ± 2.5 | worse / undecided |" in text
    )
    assert "| base | 70.0 ± 24.8 | 50.0 ± 0.0 |  |  | baseline | 0.5 | 20 | 10 |" in text
    assert "| bad (0 of 3 seeds) | – | – | – | – | undecided / undecided | – | – | – |" in text
    assert "Failed: bad, seed 0: NonFiniteLoss: nan" in text
    assert "| untrained | 25.0 | 40.0 |" in text
    assert "| raw pixels | 36.0 | – |" in text
    for part in (
        "## A title",
        "66.8.",
        "Undecided.",
        "`python -m bench.evidence t`",
        "2026-11-24",
        f"{BASE['run.max_steps']} steps",
    ):
        assert part in text
    prose = [line for line in text.splitlines() if not line.startswith(("|", "Failed"))]
    assert max(len(line) for line in prose) <= 110

    rows = report.rows_of(table, [0, 1, 2], folder=tmp_path)
    assert report.mean_curve(rows[0], "feature_std") == ([1, 2], [0.5, pytest.approx(0.3)])
    assert report.mean_curve(rows[0], "loss_clean") == ([1, 2], [0.5, pytest.approx(0.4)])
    report.plot(table, rows, report.floors([0], folder=tmp_path), tmp_path / "t.png")
    assert 5_000 < (tmp_path / "t.png").stat().st_size < 60_000


def test_curves_are_thinned_with_both_ends() -> None:
    lines = [{"step": s, "loss": 1 / (s + 3), "lr": 1.0} for s in range(1, 101)]
    lines.insert(50, {"step": 50, "knn_top1": 9.0})  # an evaluation is no point of the curve
    curve = thin(lines, points=5)
    assert curve == {
        "step": [1, 26, 51, 75, 100],
        "loss": [0.25, 0.034483, 0.018519, 0.012821, 0.0097087],
    }
    assert thin(lines[:1]) == {"step": [1], "loss": [0.25]}


# Runs


def test_a_failure_replaces_no_result_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = save(TASK, {"status": "failed", "error": "E"}, tmp_path)
    assert not finished(TASK, tmp_path)
    assert load(TASK, tmp_path) is not None
    save(TASK, record(1.0, 2.0), tmp_path)
    save(TASK, {"status": "failed", "error": "E"}, tmp_path)
    assert finished(TASK, tmp_path)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=f"{path.name} is no JSON"):
        finished(TASK, tmp_path)


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    with (
        runs._alone(tmp_path),
        pytest.raises(RuntimeError, match="another sweep"),
        runs._alone(tmp_path),
    ):
        pass


def make_images(folder: Path, n: int) -> None:
    rng = np.random.default_rng(n)
    for i in range(n):
        pixels = rng.integers(0, 128, (20, 20, 3)) + 127 * (i % 2)
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.mark.slow
def test_a_sweep_trains_records_failures_resumes_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "train", 72)
    make_images(tmp_path / "test", 20)
    base = {
        "run.max_steps": 3, "data.image_size": 32, "model.patch_size": 4,
        "data.path": f"{tmp_path}/train", "data.eval_path": f"{tmp_path}/test",
        "data.cache_dir": f"{tmp_path}/cache",
        "model.width": 32, "model.depth": 1, "model.heads": 2,
    }  # fmt: skip
    floors = Task("untrained", {**base, "method": "ijepa"}, 0, floors=True)
    bad = Task("bad", {**base, **NJEPA, "mask.min_keep": 15}, 0)
    good = Task("good", {**base, **NJEPA}, 0)
    killed = Task("killed", {**base, **IJEPA}, 0)
    give = runs._Worker.give

    def give_and_kill(self: Any, task: Task) -> None:
        give(self, task)
        if task.name == "killed":
            self.process.kill()

    results, work, said = tmp_path / "results", tmp_path / "work", list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(runs._Worker, "give", give_and_kill)
        failed = runs.sweep([killed, floors, bad, good], 1, results, work, said.append)
    assert failed == [killed, bad]
    assert "4 to do" in said[0]
    assert "exit code -9" in (load(killed, results) or {})["error"]
    error = (load(bad, results) or {})["error"]
    assert error.startswith("ConfigError: ")
    assert "min_keep" in error
    assert "FAILED (ConfigError: " in said[3]
    assert sorted(path.name for path in work.iterdir()) == [".lock", "worker-0.log"]

    first = load(good, results)
    assert first is not None
    assert first["settings"]["noise.sigma"] == SIGMA
    assert first["curve"]["step"] == [1, 2, 3]
    for name in ("loss", "loss_clean", "loss_noise", "loss_consistency", "feature_std", "rankme"):
        assert len(first["curve"][name]) == 3
        assert all(value > 0 for value in first["curve"][name])
    assert first["feature_std"] == first["curve"]["feature_std"][-1]
    assert first["scores"]["knn_top1"] == 100.0  # dark and light images
    assert set((load(floors, results) or {})["scores"]) >= {"knn_top1_init", "knn_top1_pixels"}

    # The failed ones run again, and one whose cause is gone succeeds; the others are not touched.
    # A run that was lost gives the same numbers again, after another one in the same process.
    untouched = (results / f"{floors.key}.json").stat().st_mtime_ns
    (results / f"{good.key}.json").unlink()
    again = list[str]()
    assert runs.sweep([killed, floors, bad, good], 1, results, work, again.append) == [bad]
    assert "1 of them known, 3 to do" in again[0]
    assert finished(killed, results)
    assert (results / f"{floors.key}.json").stat().st_mtime_ns == untouched
    second = load(good, results)
    assert second is not None
    assert {k: second[k] for k in ("scores", "curve")} == {k: first[k] for k in ("scores", "curve")}
