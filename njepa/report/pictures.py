"""All pictures of a run, as far as there are images and a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from njepa.config import Config
from njepa.data.index import ImageIndex
from njepa.data.sources import open_source
from njepa.evaluation.evaluate import open_test_side
from njepa.evaluation.features import pool
from njepa.report.drawing import data_uri
from njepa.report.figures import (
    ErrorPanel,
    FeaturePanel,
    MaskFigure,
    NeighbourRow,
    error_panel,
    feature_panel,
    mask_figures,
    neighbour_rows,
)
from njepa.report.images import Gallery, StepViews, gallery, some_ids, step_views
from njepa.report.network import Network, open_network, prediction_errors
from njepa.report.record import RunRecord
from njepa.runs.folder import DECODE_PICTURE

T = TypeVar("T")

#: Images of each figure, neighbours of an image.
SHOWN, NEIGHBOURS = 6, 6


@dataclass
class Pictures:
    """Figures of a run; None where something that they need is missing."""

    masks: list[MaskFigure] | None = None
    step: int = 0
    """Optimizer steps before that of the masks."""
    errors: ErrorPanel | None = None
    features: FeaturePanel | None = None
    neighbours: list[NeighbourRow] | None = None
    bank: int = 0
    """Images that the neighbours are searched among."""
    from_test: bool = False
    """Whether features and neighbours are of test images."""
    decoded: str | None = None
    """What ``njepa probe --kind decode`` drew into the run folder, as a data URI."""
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def attempt(self, what: str, make: Callable[[], T]) -> T | None:
        """``make()``; what it raises becomes a line of ``missing``."""
        try:
            return make()
        except Exception as error:  # a damaged file raises almost anything; the page says what
            text = " ".join(str(error).split())
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            self.missing.append(f"{what}: {kind}{text[:400]}{' ...' * (len(text) > 400)}")
            return None


def take_pictures(run: RunRecord, device: torch.device) -> Pictures:
    """Whatever can be drawn; never raises because of what is missing or damaged."""
    began, found = time.perf_counter(), Pictures()
    if (run.path / DECODE_PICTURE).is_file():
        found.decoded = found.attempt(DECODE_PICTURE, lambda: _decoded(run.path / DECODE_PICTURE))
    config = run.config
    if config is None:
        return found
    index = found.attempt(
        "pictures, because the images cannot be opened",
        lambda: open_source(config.data.path, config.data.cache_dir, progress=False),
    )
    network = None
    if run.checkpoint is not None:
        network = found.attempt(
            "pictures of features, because the checkpoint cannot be read",
            lambda: open_network(run, config, device),
        )
    if index is not None:
        digest = run.state.get("data_digest")
        if digest not in (None, index.digest):
            found.missing.append(
                "the images of the training: data.path holds others now, which are shown instead"
            )
        _add_masks(found, run, config, index, network)
        if network is not None:
            _add_features(found, config, index, network)
    found.seconds = time.perf_counter() - began
    return found


def _decoded(file: Path) -> str:
    with Image.open(file, formats=("PNG",)) as image:
        return data_uri(np.asarray(image.convert("RGB")), largest=1600)


def _add_masks(
    found: Pictures, run: RunRecord, config: Config, index: ImageIndex, network: Network | None
) -> None:
    views = found.attempt("masks", lambda: step_views(run, config, index, SHOWN))
    if views is None:
        return
    found.step, found.masks = views.step, mask_figures(views)
    if views.unreadable:
        found.missing.append(f"images of the masks, replaced by others: {_list(views.unreadable)}")
    if network is None:
        return
    if network.jepa is None:
        found.missing.append(f"error maps: {network.absent}")
    else:
        found.errors = found.attempt("error maps", lambda: _errors(network, views))


def _errors(network: Network, views: StepViews) -> ErrorPanel:
    assert network.jepa is not None
    return error_panel(views, prediction_errors(network.jepa, network, views))


def _add_features(found: Pictures, config: Config, index: ImageIndex, network: Network) -> None:
    test = found.attempt("test images", lambda: open_test_side(config, index))
    shown, seed, size = test or index, config.run.seed, config.data.image_size
    found.from_test = test is not None
    ids = some_ids(shown, SHOWN, seed)
    queries = found.attempt("feature maps", lambda: gallery(shown, ids, size))
    if queries is None:
        return
    if queries.grey:
        found.missing.append(f"images that cannot be read and are grey: {_list(queries.grey)}")
    tokens = network.tokens(queries.images)
    found.features = found.attempt("feature maps", lambda: feature_panel(queries, tokens))
    count = network.bank_size()
    others = some_ids(index, count + SHOWN, seed + 1)
    if test is None:  # an image is its own nearest neighbour
        others = others[~torch.isin(torch.from_numpy(others), torch.from_numpy(ids)).numpy()]
    others = others[:count]

    def rows() -> list[NeighbourRow]:
        bank: Gallery = gallery(index, others, size)
        features = [pool(network.tokens(x)) for x in bank.images.split(256)]
        return neighbour_rows(queries, pool(tokens), bank, torch.cat(features), NEIGHBOURS)

    found.bank = len(others)
    found.neighbours = found.attempt("nearest neighbours", rows)


def _list(names: list[str]) -> str:
    return "; ".join(names[:5]) + "; ..." * (len(names) > 5)
