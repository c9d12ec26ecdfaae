"""The labelled images that subjects are probed on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from njepa.config import ConfigError
from njepa.data.index import ImageIndex
from njepa.data.sources import open_source
from njepa.evaluation.images import Int64Array, subset


@dataclass(frozen=True)
class Side:
    """Labelled images of a source: which of them, and their classes."""

    index: ImageIndex
    ids: Int64Array
    labels: Tensor
    """int64 [n], in the numbering of the training side; all 0 where no kind needs labels."""

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
    train: Path,
    test: Path,
    cache: Path | None,
    limits: tuple[int | None, int | None],
    seed: int,
    labelled: bool = True,
) -> Task:
    """Open both sources.

    Args:
        labelled: whether labels are read; without them any source of images will do.

    Raises:
        ConfigError: no images, no labels, one class only, or classes on the test side
            that the training side does not have.
    """
    sides, classes = [], None
    for option, path, limit in (("--train", train, limits[0]), ("--test", test, limits[1])):
        index = open_source(path, cache)
        ids = subset(index, limit, seed)
        if not labelled:
            sides.append(Side(index, ids, torch.zeros(len(ids), dtype=torch.int64)))
            continue
        labels = index.labels_in(index.classes if classes is None else classes)
        if labels is None:
            raise ConfigError(f"{option} {path}: {_no_labels(index, path)}")
        if (labels < 0).any():
            unknown = sorted(set(index.classes) - set(classes or []))
            raise ConfigError(
                f"--test {path}: its classes must be among the {len(classes or [])} of --train "
                f"{train}, got {len(unknown)} others: {', '.join(unknown[:5])}; give both sides "
                f"the same class folders"
            )
        classes = classes or index.classes
        sides.append(Side(index, ids, torch.as_tensor(labels[ids]).long()))
    return Task(*sides)


def _no_labels(index: ImageIndex, path: Path) -> str:
    folders = {name.split("/", 1)[0] for name in index.names if "/" in name}
    if len(folders) == 1 and path.is_dir() and not index.shards:
        only = folders.pop()
        nested = all(name.count("/") > 1 for name in index.names)
        way_out = (
            f"give {index.root / only}, whose folders would be the classes"
            if nested
            else "give a folder with a folder for each class"
        )
        return (
            f"a probe needs two classes or more, got one, {only!r}, with all {index.n} images; "
            f"{way_out}"
        )
    return (
        f"a probe needs labels of two classes or more, got {index.n} images with none or all of "
        f"one class; give a folder of class folders, a list file with a tab and a label on every "
        f"line, shards with .cls members, or Parquet with a column label"
    )
