"""Figures in the form that the page shows: pictures as data URIs, blocks as rectangles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from njepa.report.drawing import coloured, data_uri
from njepa.report.images import Gallery, StepViews
from njepa.report.maps import Packed, nearest, packed_tokens, pca_colours
from njepa.report.network import Errors


@dataclass(frozen=True)
class Block:
    """A target block in units of patches."""

    x: int
    y: int
    width: int
    height: int
    sigma: str
    """Standard deviation of its noise; empty without noise."""


@dataclass(frozen=True)
class MaskFigure:
    name: str
    uri: str
    side: int
    """Patches per row."""
    hidden: list[tuple[int, int]]
    """(x, y) of the patches that are no context."""
    blocks: list[Block]
    context: int
    """Number of context patches."""


def mask_figures(views: StepViews) -> list[MaskFigure]:
    """Each image with its context and its target blocks."""
    context_idx, target_idx, lengths = views.masks
    pictures = views.images.numpy()
    found = []
    for i, name in enumerate(views.names):
        side = views.grid_side
        count = context_idx.shape[1] if lengths is None else lengths.counts[i]
        kept = set(context_idx[i, :count].tolist())
        hidden = [(n % side, n // side) for n in range(side * side) if n not in kept]
        blocks = []
        for m, patches in enumerate(target_idx[i].tolist()):
            rows, columns = [p // side for p in patches], [p % side for p in patches]
            sigma = "" if views.noise is None else f"{float(views.noise.sigma[i, m]):.3g}"
            x, y = min(columns), min(rows)
            blocks.append(Block(x, y, max(columns) - x + 1, max(rows) - y + 1, sigma))
        found.append(MaskFigure(name, data_uri(pictures[i]), side, hidden, blocks, len(kept)))
    return found


@dataclass(frozen=True)
class ErrorFigure:
    name: str
    uri: str
    maps: dict[str, str]
    """Coloured patches by branch."""


@dataclass(frozen=True)
class ErrorPanel:
    figures: list[ErrorFigure]
    high: float
    """End of the scale, which begins at 0."""
    means: dict[str, float]
    """Of each branch, over all target patches shown."""
    constant: float


def error_panel(views: StepViews, errors: Errors) -> ErrorPanel:
    """The errors of both branches on one scale, which ends at the 99th percentile."""
    values = np.concatenate([one.numpy().ravel() for one in errors.maps.values()])
    high = float(np.nanquantile(values, 0.99))
    side, pictures = views.grid_side, views.images.numpy()
    figures = [
        ErrorFigure(
            name,
            data_uri(pictures[i]),
            {
                branch: data_uri(coloured(one[i].numpy().reshape(side, side), 0.0, high))
                for branch, one in errors.maps.items()
            },
        )
        for i, name in enumerate(views.names)
    ]
    means = {branch: errors.mean(branch) for branch in errors.maps}
    return ErrorPanel(figures, high, means, errors.constant)


@dataclass(frozen=True)
class FeatureFigure:
    name: str
    label: str | None
    uri: str
    colours: str
    """The map of principal components."""


@dataclass(frozen=True)
class FeaturePanel:
    figures: list[FeatureFigure]
    side: int
    explained: list[float]
    packed: Packed

    def for_script(self) -> dict[str, Any]:
        """What ``report.js`` needs to compare patches."""
        return {
            "side": self.side,
            "images": len(self.figures),
            "dimensions": self.packed.dimensions,
            "data": self.packed.data,
        }


def feature_panel(views: Gallery, tokens: Tensor) -> FeaturePanel:
    """Colours and packed features of some images; ``tokens``: [n, N, D]."""
    side, colours = math.isqrt(tokens.shape[1]), pca_colours(tokens)
    grids = colours.rgb.unflatten(1, (side, side)).numpy()
    pictures = views.images.numpy()
    figures = [
        FeatureFigure(name, views.classes[i], data_uri(pictures[i]), data_uri(grids[i]))
        for i, name in enumerate(views.names)
    ]
    return FeaturePanel(figures, side, colours.explained, packed_tokens(tokens))


@dataclass(frozen=True)
class Neighbour:
    name: str
    label: str | None
    uri: str
    cosine: float
    same: bool | None
    """Whether its class is that of the image asked for; None without classes."""


@dataclass(frozen=True)
class NeighbourRow:
    name: str
    label: str | None
    uri: str
    neighbours: list[Neighbour]
    places: int
    """Decimals of the cosines, so that those near 1 can be told apart."""


_THUMBNAIL = 96


def _places(cosine: float) -> int:
    """Decimals that show two digits of the distance of ``cosine`` to 1; 3 to 5."""
    return min(max(1 - math.floor(math.log10(max(1 - cosine, 1e-9))), 3), 5)


def neighbour_rows(
    queries: Gallery, features: Tensor, bank: Gallery, bank_features: Tensor, count: int
) -> list[NeighbourRow]:
    """The most similar images of the bank for each query, by the cosine of pooled features."""
    cosines, places = nearest(features, bank_features, count)
    rows = []
    for q, name in enumerate(queries.names):
        own, found = queries.classes[q], []
        for cosine, place in zip(cosines[q].tolist(), places[q].tolist(), strict=True):
            label = bank.classes[place]
            same = None if own is None or label is None else own == label
            uri = data_uri(bank.images[place].numpy(), _THUMBNAIL)
            found.append(Neighbour(bank.names[place], label, uri, cosine, same))
        uri = data_uri(queries.images[q].numpy(), _THUMBNAIL)
        rows.append(NeighbourRow(name, own, uri, found, _places(cosines[q].min().item())))
    return rows
