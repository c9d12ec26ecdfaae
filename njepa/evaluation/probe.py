"""``njepa probe`` without its command line: kinds of probes, each beside its floors.

The images are read once for each encoder and kept as features on disk; the test images are used
once, after every setting was chosen on a split of the training images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from njepa.config import ConfigError
from njepa.data.index import ImageIndex
from njepa.data.sources import cache_dir, open_source
from njepa.evaluation.features import Views, cached, extract, pixel_views, pooled_views
from njepa.evaluation.images import Int64Array, stream, subset
from njepa.evaluation.knn import knn_accuracies
from njepa.evaluation.linear import linear_probe
from njepa.evaluation.logistic import logistic_accuracy
from njepa.evaluation.splits import held_out
from njepa.evaluation.subject import Subject


@dataclass(frozen=True)
class Settings:
    """What the command line sets; the defaults are those of docs/evaluation.md."""

    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours; ``top1`` is that of 20, or of the first where 20 is not among them."""
    temperature: float = 0.07
    seed: int = 0
    batch_size: int = 256
    device: str = "cpu"
    cache: Path | None = None


@dataclass(frozen=True)
class Side:
    """Labelled images of a source: which of them, and their classes."""

    index: ImageIndex
    ids: Int64Array
    labels: Tensor
    """int64 [n], in the numbering of the training side."""

    def facts(self) -> dict[str, object]:
        return {"source": self.index.digest, "n": len(self.ids)}


@dataclass(frozen=True)
class Task:
    """Images and classes that every subject of a call is probed on."""

    train: Side
    test: Side

    @property
    def names(self) -> list[str]:
        return self.train.index.classes


def open_task(
    train: Path, test: Path, cache: Path | None, limits: tuple[int | None, int | None], seed: int
) -> Task:
    """Open both sources.

    Raises:
        SourceError, ConfigError: no images, no labels, one class only, or classes on the test side
            that the training side does not have.
    """
    sides, classes = [], None
    for option, path, limit in (("--train", train, limits[0]), ("--test", test, limits[1])):
        index = open_source(path, cache)
        labels = index.labels_in(index.classes if classes is None else classes)
        if labels is None:
            raise ConfigError(f"{option} {path}: {_no_labels(index)}")
        if (labels < 0).any():
            unknown = sorted(set(index.classes) - set(classes or []))
            raise ConfigError(
                f"--test {path}: its classes must be among the {len(classes or [])} of --train "
                f"{train}, got {len(unknown)} others: {', '.join(unknown[:5])}; give both sides "
                f"the same class folders"
            )
        classes = classes or index.classes
        ids = subset(index, limit, seed)
        sides.append(Side(index, ids, torch.as_tensor(labels[ids]).long()))
    return Task(*sides)


def _no_labels(index: ImageIndex) -> str:
    folders = {name.split("/", 1)[0] for name in index.names if "/" in name}
    if len(folders) == 1 and not index.shards:
        only = folders.pop()
        return (
            f"a probe needs two classes or more, got one, {only!r}, with all {index.n} images; "
            f"give a folder of class folders (perhaps {index.root / only})"
        )
    return (
        f"a probe needs labels, got {index.n} images without any; give a folder of class folders, "
        f"a list file with a tab and a label on every line, or shards with .cls members"
    )


Probe = Callable[["Features", Settings], dict[str, Any]]


@dataclass(frozen=True)
class Features:
    """Features of both sides in each view, on the device, with labels."""

    train: dict[str, Tensor]
    labels: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor
    names: list[str]

    @property
    def main(self) -> tuple[Tensor, Tensor]:
        """The mean of the last layer's tokens, or pixels where there is nothing else."""
        name = "mean" if "mean" in self.train else "pixels"
        return self.train[name], self.test[name]


def features_of(
    views: Views, digest: str, image_size: int, task: Task, settings: Settings
) -> Features:
    """Features of a network, from the cache where they are known.

    Args:
        digest: of the network; equal digests mean equal features.
    """
    folder, device = cache_dir(settings.cache) / "features", settings.device

    def side(part: Side) -> dict[str, Tensor]:
        facts = {"network": digest, "image_size": image_size, "seed": settings.seed, **part.facts()}
        batches = stream(part.index, part.ids, image_size, settings.batch_size)
        found = cached(folder, facts, lambda: extract(views, batches, device))
        return {name: found[name].to(device) for name in sorted(found)}  # a file has no order

    train, test = side(task.train), side(task.test)
    return Features(
        train, task.train.labels.to(device), test, task.test.labels.to(device), task.names
    )


def knn(features: Features, settings: Settings) -> dict[str, Any]:
    """kNN for each k; the k of ``top1`` is fixed beforehand."""
    train, test = features.main
    if max(settings.ks) > len(train):
        raise ConfigError(
            f"kNN with k={max(settings.ks)} needs as many training images, got {len(train)}; "
            f"use --k with at most {len(train)}"
        )
    found = knn_accuracies(
        train, features.labels, test, features.test_labels, settings.ks, settings.temperature
    )
    first = 20 if 20 in found else settings.ks[0]
    return {**found[first].as_json(), "k": {str(k): v.as_json() for k, v in found.items()}}


def linear(features: Features, settings: Settings) -> dict[str, Any]:
    chooses = held_out(features.labels.cpu(), features.names).to(features.labels.device)
    return linear_probe(
        features.train, features.labels, features.test, features.test_labels, chooses, settings.seed
    ).as_json()


def logistic(features: Features, settings: Settings) -> dict[str, Any]:
    """The linear probe of ``summary.json``."""
    train, test = features.main
    return logistic_accuracy(train, features.labels, test, features.test_labels).as_json()


#: Probes on cached features.
ON_FEATURES: dict[str, Probe] = {"knn": knn, "linear": linear, "logistic": logistic}


def probe(
    subject: Subject,
    floor: Subject | None,
    task: Task,
    kinds: Sequence[str],
    settings: Settings,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of each kind as they come: ``top1``, ``ci95``, ``floors`` and what the kind adds.

    Args:
        floor: the untrained network; None: no floors.
    """
    device = settings.device
    rows = {"": (pooled_views(subject.encoder.to(device)), subject.digest)}
    if floor is not None:
        rows["untrained"] = (pooled_views(floor.encoder.to(device)), floor.digest)
        rows["pixels"] = (pixel_views, "pixels")
    wanted = [kind for kind in kinds if kind in ON_FEATURES]
    found = {
        name: features_of(views, digest, subject.image_size, task, settings)
        for name, (views, digest) in (rows.items() if wanted else ())
    }
    for kind in wanted:
        results = {name: ON_FEATURES[kind](features, settings) for name, features in found.items()}
        own = results.pop("")
        floors = {name: {k: r[k] for k in ("top1", "ci95")} for name, r in results.items()}
        yield kind, {**own, **({"floors": floors} if floors else {})}
