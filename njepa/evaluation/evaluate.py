"""The evaluation of a run: its encoders, untrained network and raw pixels on the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from njepa.config import Config, ConfigError
from njepa.data.index import ImageIndex
from njepa.data.sources import open_source
from njepa.evaluation.accuracy import Accuracy, report
from njepa.evaluation.features import pooled_features, raw_pixels
from njepa.evaluation.images import LabelledImages, align_classes, load_split
from njepa.evaluation.knn import knn_accuracy
from njepa.evaluation.logistic import logistic_accuracy

__all__ = ["Evaluator", "open_test_side", "report"]


def open_test_side(config: Config, train: ImageIndex) -> ImageIndex | None:
    """Index of the labelled test images; None where a run has none.

    Raises:
        ConfigError: ``data.eval_path`` is set and cannot be used with ``data.path``.
    """
    path: Path | None = config.data.eval_path
    if config.data.path is None:
        path = train.root.parent / "test"  # the embedded set
    if path is None:
        return None
    if train.labels is None:
        raise ConfigError(
            f"data.eval_path={path} needs labels on the training side too, and data.path="
            f"{config.data.path} has no class folders; unset data.eval_path"
        )
    test = open_source(path, config.data.cache_dir, progress=config.run.progress)
    align_classes(train, test)
    return test


class Evaluator:
    """kNN and linear probe on the labelled split; decodes its images once, when first used."""

    def __init__(self, config: Config, train: ImageIndex, test: ImageIndex, device: torch.device):
        self._config, self._device = config, device
        self._train_index, self._test_index = train, test
        self._splits: tuple[LabelledImages, LabelledImages] | None = None

    def knn(self, encode: Callable[[Tensor], Tensor]) -> Accuracy:
        """kNN top-1 of an encoder that maps uint8 [B, S, S, 3] to [B, N, D]."""
        return self._knn(*self._features(encode))

    def floors(self, untrained: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """kNN of the untrained network and of raw pixels, linear probe of the former."""
        features = self._features(untrained)
        pixels = self._knn(*(raw_pixels(split.images) for split in self._decoded()))
        return {
            **report("knn_top1_init", self._knn(*features)),
            **report("knn_top1_pixels", pixels),
            **report("linear_top1_init", self._linear(*features)),
        }

    def final(self, encode: Callable[[Tensor], Tensor], suffix: str = "") -> dict[str, Any]:
        """kNN and linear probe of a trained encoder; ``suffix``: of the keys."""
        features = self._features(encode)
        return {
            **report(f"knn_top1{suffix}", self._knn(*features)),
            **report(f"linear_top1{suffix}", self._linear(*features)),
        }

    def _features(self, encode: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        train, test = (
            pooled_features(encode, split, self._config, self._device) for split in self._decoded()
        )
        return train, test

    def _knn(self, train: Tensor, test: Tensor) -> Accuracy:
        labels = [split.labels for split in self._decoded()]
        k, temperature = self._config.eval.knn_k, self._config.eval.knn_temperature
        return knn_accuracy(train, labels[0], test, labels[1], k, temperature)

    def _linear(self, train: Tensor, test: Tensor) -> Accuracy:
        labels = [split.labels for split in self._decoded()]
        return logistic_accuracy(train, labels[0], test, labels[1])

    def _decoded(self) -> tuple[LabelledImages, LabelledImages]:
        if self._splits is None:
            config = self._config
            size, seed = config.data.image_size, config.run.seed
            train, test = self._train_index, self._test_index
            self._splits = (
                load_split(train, config.eval.max_train, size, seed, align_classes(train, train)),
                load_split(test, config.eval.max_test, size, seed, align_classes(train, test)),
            )
        return self._splits
