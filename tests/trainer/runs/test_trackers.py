"""run.tracker: what each library is told, by fakes; none of them here needs to be installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from njepa import cli
from njepa.config import ConfigError, load_config
from njepa.runs import trackers
from njepa.runs.trackers import open_board, require
from njepa.runs.tracking import Tracker

CONFIG = load_config("shapes-tiny")


class Calls(list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
    """Records what is called on it by any name."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.append((name, args, options))


def install(monkeypatch: pytest.MonkeyPatch, name: str, **parts: Any) -> None:
    module = ModuleType(name)
    vars(module).update(parts)
    monkeypatch.setitem(sys.modules, name, module)


def track(run: Path, tracker: str) -> None:
    """Two lines of a run; values that are no numbers go to metrics.jsonl alone."""
    board = open_board(tracker, run, CONFIG)
    tracking = Tracker(run, 0, 20, tensorboard=False, progress=False, board=board)
    tracking.log(10, {"loss": 0.5, "epoch": 1, "impl": "native"})
    tracking.log(20, {"loss": 0.25, "epoch": 2})
    tracking.close()


LINES = [(10, {"loss": 0.5, "epoch": 1.0}), (20, {"loss": 0.25, "epoch": 2.0})]


@pytest.mark.parametrize(("wanted", "mode"), [(None, "offline"), ("online", None)])
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str | None, mode: Any):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if wanted:
        monkeypatch.setenv("WANDB_MODE", wanted)
    calls, begun = Calls(), []
    install(monkeypatch, "wandb", init=lambda **options: begun.append(options) or calls)
    track(tmp_path, "wandb")
    assert begun[0]["mode"] == mode
    assert begun[0]["dir"] == str(tmp_path)
    assert begun[0]["config"]["optim"]["lr"] == CONFIG.optim.lr
    assert [(options["step"], args[0]) for name, args, options in calls[:-1]] == LINES
    assert calls[-1][0] == "finish"


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    batches: list[Any] = []
    ended: list[str] = []
    opened: list[str] = []
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name: "7",
        create_run=lambda experiment, run_name: SimpleNamespace(info=SimpleNamespace(run_id="r")),
        log_param=lambda run, key, value: None,
        log_batch=lambda run, metrics: batches.append(metrics),
        set_terminated=ended.append,
    )
    install(monkeypatch, "mlflow", MlflowClient=lambda uri: opened.append(uri) or client)
    metric = lambda name, value, now, step: (step, name, value)  # noqa: E731
    install(monkeypatch, "mlflow.entities", Metric=metric)
    track(tmp_path, "mlflow")
    assert opened == [f"sqlite:///{tmp_path}/mlflow.db"]
    assert batches == [[(step, *item) for item in numbers.items()] for step, numbers in LINES]
    assert ended == ["r"]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.delenv("TRACKIO_DIR")
    calls = Calls()
    names = {name: getattr(calls, name) for name in ("init", "log", "finish")}
    install(monkeypatch, "trackio", **names)
    track(tmp_path, "trackio")
    assert trackers.os.environ["TRACKIO_DIR"] == str(tmp_path / "trackio")
    assert [name for name, *_ in calls] == ["init", "log", "log", "finish"]
    assert [(options["step"], args[0]) for _, args, options in calls[1:-1]] == LINES


def test_a_library_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """It is told once and left out from then on; metrics.jsonl has every line."""

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("a fault of theirs")

    broken = SimpleNamespace(log=fail, finish=fail)
    install(monkeypatch, "wandb", init=lambda **options: broken)
    track(tmp_path, "wandb")
    assert caplog.text.count("Wandb's events cannot be written and end here") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    unlogged = SimpleNamespace(log=lambda *args, **options: None, finish=fail)
    install(monkeypatch, "wandb", init=lambda **options: unlogged)
    track(tmp_path, "wandb")
    assert "Wandb was not closed: RuntimeError('a fault of theirs')" in caplog.text


def test_none_is_no_board(tmp_path: Path):
    require("none")
    assert open_board("none", tmp_path, CONFIG) is None


def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """One line before any work; the folder that wandb leaves is no library."""
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2}')
    assert cli.main(["train", "run.tracker=mlflow"]) == 2
    message = capsys.readouterr().err
    assert "run.tracker=mlflow needs the library mlflow, which" in message
    assert message.rstrip().endswith("pip install mlflow")
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(trackers, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(ConfigError, match="pip install wandb"):
        require("wandb")
