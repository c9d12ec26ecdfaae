"""``njepa probe`` without its command line: kinds of probes, each beside its floors.

The images are read once for each encoder and kept as features on disk; the test images are used
once, after every setting was chosen on a split of the training images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from njepa.config import ConfigError
from njepa.data.sources import cache_dir
from njepa.evaluation import dense, finetune
from njepa.evaluation.attentive import attentive_probe
from njepa.evaluation.features import Views, cached, extract, pixel_views, pooled_views
from njepa.evaluation.images import stream
from njepa.evaluation.knn import knn_accuracies
from njepa.evaluation.linear import linear_probe
from njepa.evaluation.logistic import logistic_accuracy
from njepa.evaluation.lowshot import SHOTS, lowshot_probe
from njepa.evaluation.scenes import FRAMES, scenes
from njepa.evaluation.splits import few_labels, held_out
from njepa.evaluation.subject import Subject
from njepa.evaluation.task import Side, Task
from njepa.evaluation.tokens import TokenStore

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the command line sets; docs/evaluation.md explains the defaults."""

    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours; ``top1`` is that of 20, or of the first where 20 is not among them."""
    temperature: float = 0.07
    shots: tuple[int, ...] = SHOTS
    """Labelled images of a class; ``top1`` is that of the most."""
    finetune_epochs: int = 100
    seed: int = 0
    batch_size: int = 256
    device: str = "cpu"
    cache: Path | None = None


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


def check_enough(task: Task, kinds: Sequence[str], settings: Settings) -> None:
    """Before any image is decoded: there are as many training images as the kinds need.

    Raises:
        ConfigError: fewer than neighbours, than labelled images of a class, or none to choose on.
    """
    labels, names, k = task.train.labels, task.names, max(settings.ks)
    if "knn" in kinds and k > len(labels):
        raise ConfigError(
            f"kNN with k={k} needs as many training images, got {len(labels)}; use --k with at "
            f"most {len(labels)}"
        )
    if "lowshot" in kinds:
        few_labels(labels, names, max(settings.shots), settings.seed)
    if {"linear", "attentive"} & set(kinds):
        held_out(labels, names)


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
        n = -(-len(part.ids) // settings.batch_size)
        batches = tqdm(
            stream(part.index, part.ids, image_size, settings.batch_size),
            "features", n, unit="batch", disable=None, leave=False,
        )  # fmt: skip
        found = cached(folder, facts, lambda: extract(views, batches, device))
        return {name: found[name].to(device) for name in sorted(found)}  # a file has no order

    train, test = side(task.train), side(task.test)
    return Features(
        train, task.train.labels.to(device), test, task.test.labels.to(device), task.names
    )


def knn(features: Features, settings: Settings) -> Result:
    """kNN for each k; the k of ``top1`` is fixed beforehand."""
    train, test = features.main
    found = knn_accuracies(
        train, features.labels, test, features.test_labels, settings.ks, settings.temperature
    )
    first = 20 if 20 in found else settings.ks[0]
    return {**found[first].as_json(), "k": {str(k): v.as_json() for k, v in found.items()}}


def linear(features: Features, settings: Settings) -> Result:
    chooses = held_out(features.labels.cpu(), features.names).to(features.labels.device)
    return linear_probe(
        features.train, features.labels, features.test, features.test_labels, chooses, settings.seed
    ).as_json()


def logistic(features: Features, settings: Settings) -> Result:
    """The linear probe of ``summary.json``."""
    train, test = features.main
    return logistic_accuracy(train, features.labels, test, features.test_labels).as_json()


def lowshot(features: Features, settings: Settings) -> Result:
    train, test = features.main
    found = lowshot_probe(
        train, features.labels, test, features.test_labels, features.names,
        settings.shots, settings.seed,
    )  # fmt: skip
    most = found[max(found)].as_json()
    shots = {str(n): result.as_json() for n, result in found.items()}
    return {"top1": most["top1"], "ci95": most["ci95"], "shots": shots}


def attentive(subject: Subject, task: Task, settings: Settings) -> Result:
    stores = [
        TokenStore(subject, side, settings.batch_size, settings.device)
        for side in (task.train, task.test)
    ]
    labels, test_labels = (side.labels.to(settings.device) for side in (task.train, task.test))
    chooses = held_out(task.train.labels, task.names).to(settings.device)
    width, heads = subject.weights.width, subject.weights.heads
    return attentive_probe(
        stores[0], labels, stores[1], test_labels, chooses, width, heads, settings.seed
    ).as_json()


def fine_tuned(subject: Subject, task: Task, settings: Settings) -> Result:
    return finetune.finetune(
        subject, task.train, task.test, len(task.names), settings.finetune_epochs,
        settings.batch_size, settings.device, settings.seed,
    ).as_json()  # fmt: skip


#: Probes on cached features; their floors are the untrained network and pixels.
ON_FEATURES: dict[str, Callable[[Features, Settings], Result]] = {
    "knn": knn, "linear": linear, "logistic": logistic, "lowshot": lowshot,
}  # fmt: skip
#: Probes on the network; their floor is the untrained one, fine-tuned from scratch.
ON_NETWORK: dict[str, Callable[[Subject, Task, Settings], Result]] = {
    "attentive": attentive, "finetune": fine_tuned,
}  # fmt: skip
KINDS = (*ON_FEATURES, *ON_NETWORK, "dense", "decode")


def probe(
    subject: Subject, floor: Subject | None, task: Task, kinds: Sequence[str], settings: Settings
) -> Iterator[tuple[str, Result]]:
    """Results of each kind as they come: ``top1``, ``ci95``, ``floors`` and what the kind adds.

    Args:
        floor: the untrained network; None: no floors.
        kinds: of ``ON_FEATURES`` and ``ON_NETWORK``.
    """
    networks = {"": subject} if floor is None else {"": subject, "untrained": floor}
    for network in networks.values():
        network.encoder.to(settings.device)
    found: dict[str, Features] = {}
    for kind in kinds:
        if kind in ON_NETWORK:
            results = {
                name: ON_NETWORK[kind](network, task, settings)
                for name, network in networks.items()
            }
        else:
            found = found or _all_features(networks, task, settings)
            results = {name: ON_FEATURES[kind](x, settings) for name, x in found.items()}
        yield kind, _beside_floors(results)


def dense_probes(
    subject: Subject, floor: Subject | None, settings: Settings
) -> Iterator[tuple[str, Result]]:
    """``segmentation`` and ``propagation`` on scenes of the embedded set."""
    weights, device, size = subject.weights, settings.device, subject.image_size
    encoders: dict[str, dense.Encode] = {"": subject.encoder.to(device)}
    if floor is not None:
        encoders["untrained"] = floor.encoder.to(device)
        encoders["pixels"] = dense.patch_pixels(weights.patch_size)
    sides = [scenes("train", dense.TRAIN, size), scenes("test", dense.TEST, size)]
    labels = [side.patch_labels(weights.patch_size)[:, 0].to(device) for side in sides]
    results = {}
    for name, encode in encoders.items():
        train, test = (
            dense.tokens_of(encode, side.images[:, 0], settings.batch_size, device)
            for side in sides
        )
        results[name] = dense.segmentation(train, labels[0], test, labels[1], settings.seed)
    yield "segmentation", _beside_floors(results)
    clips = scenes("test", dense.CLIPS, size, FRAMES)
    results = {}
    for name, encode in encoders.items():
        tokens = dense.clip_tokens(encode, clips, settings.batch_size, device)
        results[name] = dense.propagation(tokens, clips, weights.patch_size)
    if floor is not None:
        results["still"] = dense.standing_still(clips, weights.patch_size)
    yield "propagation", _beside_floors(results)


def _all_features(
    networks: dict[str, Subject], task: Task, settings: Settings
) -> dict[str, Features]:
    size = networks[""].image_size
    found = {
        name: features_of(pooled_views(network.encoder), network.digest, size, task, settings)
        for name, network in networks.items()
    }
    if len(networks) > 1:
        found["pixels"] = features_of(pixel_views, "pixels", size, task, settings)
    return found


def _beside_floors(results: dict[str, Result]) -> Result:
    floors = {
        name: {key: value for key, value in result.items() if key in ("top1", "ci95", "miou")}
        for name, result in results.items() if name
    }  # fmt: skip
    return {**results[""], **({"floors": floors} if floors else {})}
