"""What patch features look like: colours of their principal components, likeness, neighbours."""

from __future__ import annotations

import base64
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: Dimensions that the features in the page keep.
KEPT = 96


class Colours(NamedTuple):
    rgb: Tensor
    """uint8 [n, N, 3]."""
    explained: list[float]
    """Share of the variance of each of the three components."""


def pca_colours(tokens: Tensor) -> Colours:
    """The first three principal components of all tokens together as red, green and blue.

    Each is stretched from its 1st to its 99th percentile; its sign is that of its largest loading.

    Args:
        tokens: float [n, N, D].
    """
    rows = tokens.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[:3]
    largest = directions.abs().argmax(1, keepdim=True)
    scores = rows @ (directions * directions.gather(1, largest).sign()).T
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    share = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    total = singular.square().sum()
    if not total > 0:  # all tokens are equal: grey
        share = torch.full_like(scores, 0.5)
    rgb = F.pad(share, (0, 3 - share.shape[1]), value=0.5)
    explained = (singular.square() / total.clamp_min(1e-30))[:3].tolist()
    return Colours((255 * rgb).round().byte().unflatten(0, tokens.shape[:2]), explained)


class Packed(NamedTuple):
    """Unit tokens for the page: int8 [n, N, k] in base64, and how well they stand for all."""

    data: str
    dimensions: int
    energy: float
    """Mean squared length of what is kept of a unit token."""
    likeness: float
    """Mean cosine of two tokens."""


def packed_tokens(tokens: Tensor) -> Packed:
    """Tokens of unit length, turned into the ``KEPT`` directions that hold most of them.

    The cosine of two tokens is the dot product of what is kept, divided by their lengths.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    rows = unit.flatten(0, 1)
    likeness = float(rows.mean(0).square().sum())
    if rows.shape[1] > KEPT:
        _, _, directions = torch.linalg.svd(rows, full_matrices=False)
        rows = rows @ directions[:KEPT].T
    energy = float(rows.square().sum(1).mean())
    whole = (127 * rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-12)).round().char()
    data = base64.b64encode(whole.contiguous().numpy().tobytes()).decode()
    return Packed(data, rows.shape[1], energy, likeness)


def nearest(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(cosine, place in the bank) of the ``count`` most similar rows, [m, count] each.

    Args:
        queries: float [m, D]. bank: float [n, D].
    """
    cosine = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    values, places = cosine.topk(min(count, len(bank)), dim=1)
    return values, places
