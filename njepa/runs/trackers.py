"""One more place for the numbers of a run, behind one small interface. Rank 0 only.

Nothing here opens a connection unless the reader of the numbers asks for it: each library writes
into the run folder unless its own environment variable names another place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from njepa.config import Config, ConfigError

#: run.tracker -> the modules it needs; its own name is also what pip calls it.
#: mlflow-skinny lacks SQLAlchemy, and MLflow writes plain files no more.
MODULES = {
    "none": (),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy"),
    "trackio": ("trackio",),
}


class Board(Protocol):
    """What a place for numbers can do."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Keep the numbers of ``step``."""

    def close(self) -> None:
        """Write what is not written yet."""


def require(tracker: str) -> None:
    """Before any work.

    Raises:
        ConfigError: the library of ``run.tracker`` is not installed.
    """
    for module in MODULES[tracker]:
        spec = find_spec(module)
        # A folder of that name, as wandb leaves, is no package.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"run.tracker={tracker} needs the library {module}, which is not installed: "
                f"pip install {tracker}"
            )


def open_board(tracker: str, run: Path, config: Config) -> Board | None:
    """The place that ``run.tracker`` names; None if it names none."""
    boards: dict[str, Callable[[Path, Config], Board]]
    boards = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}
    return boards[tracker](run, config) if tracker in boards else None


class TensorBoard:
    """Event files in ``tensorboard/``; what an interrupted run wrote after ``start`` is hidden."""

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Offline, in ``wandb/``, unless WANDB_MODE says otherwise; `wandb sync` uploads it later."""

    def __init__(self, run: Path, config: Config) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="njepa",
            name=run.name,
            group=run.name,  # a resumed run is one more of the group
            dir=str(run),
            config=config.model_dump(),
            mode=None if "WANDB_MODE" in os.environ else "offline",
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A database ``mlflow.db``, unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, run: Path, config: Config) -> None:
        import mlflow

        local = f"sqlite:///{run.resolve()}/mlflow.db"
        self._client: Any = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
        found = self._client.get_experiment_by_name("njepa")
        experiment = found.experiment_id if found else self._client.create_experiment("njepa")
        created = self._client.create_run(experiment, run_name=run.name)
        self._id = created.info.run_id
        for section, values in config.model_dump(mode="json").items():
            self._client.log_param(self._id, section, str(values)[:6000])

    def log(self, step: int, numbers: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A local database in ``trackio/``, unless TRACKIO_DIR names another folder."""

    def __init__(self, run: Path, config: Config) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.resolve() / "trackio"))  # read on import
        import trackio

        self._trackio: Any = trackio
        trackio.init(project="njepa", name=run.name, config=config.model_dump(mode="json"))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._trackio.log(numbers, step=step)

    def close(self) -> None:
        self._trackio.finish()
