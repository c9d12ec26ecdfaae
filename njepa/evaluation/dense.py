"""Dense probes of patch tokens on scenes of the embedded set, whose masks are known.

``segmentation``: a linear head tells the pattern of every patch, one of 16 (``linear.py``, on
tokens instead of pooled features). ``propagation``: no training at all; the mask of a clip's first
frame is carried to the next ones by the similarity of tokens, as on DAVIS in the script of DINO
(arXiv 2104.14294, appendix; ``eval_video_segmentation.py``): each token takes the mean of its most
similar tokens in the first frame and the frames just before, within a window, weighted by
exp(cosine / 0.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from njepa.evaluation.linear import linear_probe
from njepa.evaluation.scenes import FRAMES, Scenes

TRAIN, TEST, CLIPS = 1000, 500, 200
#: Epochs of the segmentation head: each image gives it as many rows as it has patches.
EPOCHS = 5
_NEIGHBOURS, _TEMPERATURE, _BEFORE = 5, 0.1, 4
_WINDOW = 3  # patches up, down, left and right

#: Tokens [B, N, F] of images uint8 [B, S, S, 3].
Encode = Callable[[Tensor], Tensor]


def patch_pixels(patch: int) -> Encode:
    """The pixels of each patch as its token: the floor."""

    def encode(images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float() / 255 - 0.5
        return F.unfold(x, patch, stride=patch).transpose(1, 2)

    return encode


@torch.no_grad()
def tokens_of(encode: Encode, images: Tensor, batch_size: int, device: str) -> Tensor:
    """float32 [n, N, F] of images uint8 [n, 3, S, S]."""
    batches = images.permute(0, 2, 3, 1).split(batch_size)
    return torch.cat([encode(x.to(device)).float() for x in batches])


def segmentation(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, seed: int = 0
) -> dict[str, Any]:
    """Share of patches that get their pattern, and the mean IoU of the patterns, in percent.

    The interval is that of the mean over scenes: patches of one scene are not independent.

    Args:
        train, test: tokens [n, N, F], [m, N, F].
        labels, test_labels: int64 [n, N], [m, N].
    """
    chooses = (torch.arange(len(train), device=labels.device) % 10 == 0)[:, None]
    result = linear_probe(
        {"tokens": train.flatten(0, 1)},
        labels.flatten(),
        {"tokens": test.flatten(0, 1)},
        test_labels.flatten(),
        chooses.expand_as(labels).flatten(),
        seed,
        EPOCHS,
    )
    predicted = result.predicted.view_as(test_labels)
    return {
        **mean_of((predicted == test_labels).double().mean(1)),
        "miou": round(100 * mean_iou(predicted.flatten(), test_labels.flatten()), 2),
        "head": result.head._asdict(),
    }


def mean_iou(predicted: Tensor, wanted: Tensor) -> float:
    """Intersection over union of each class that occurs in either, averaged over classes."""
    ious = []
    for c in torch.cat([predicted, wanted]).unique():
        both = ((predicted == c) & (wanted == c)).sum()
        ious.append(both / ((predicted == c) | (wanted == c)).sum())
    return float(torch.stack(ious).double().mean())


def propagate(tokens: Tensor, first: Tensor) -> Tensor:
    """Masks of all frames of a clip from the mask of the first.

    Args:
        tokens: [T, N, F] of a square grid.
        first: float [N], share of the object in each patch.

    Returns:
        float [T, N]; frame 0 is ``first``.
    """
    x = F.normalize(tokens, dim=-1)
    side = math.isqrt(x.shape[1])
    row, column = torch.meshgrid(*[torch.arange(side, device=x.device)] * 2, indexing="ij")
    place = torch.stack([row.flatten(), column.flatten()], 1)
    far = (place[:, None] - place[None]).abs().amax(-1) > _WINDOW
    masks = [first]
    for t in range(1, len(x)):
        frames = [0, *range(max(1, t - _BEFORE), t)]
        cosine = torch.cat([(x[t] @ x[f].T).masked_fill(far, -torch.inf) for f in frames], dim=1)
        known = torch.cat([masks[f] for f in frames])
        near, where = cosine.topk(min(_NEIGHBOURS, cosine.shape[1]), dim=1)
        weights = torch.softmax(near / _TEMPERATURE, dim=1)
        masks.append((weights * known[where]).sum(1))
    return torch.stack(masks)


def propagation(tokens: Tensor, clips: Scenes, patch: int) -> dict[str, Any]:
    """Mean IoU of the propagated disc with the true one, pixel by pixel, frames 2 to T, percent.

    Args:
        tokens: [n, T, N, F].
    """
    shares = clips.patch_masks(patch).to(tokens.device)
    masks = torch.stack([propagate(x, m[0]) for x, m in zip(tokens, shares, strict=True)])
    return mean_of(_region_similarity(masks, clips.inside.to(tokens.device)))


def standing_still(clips: Scenes, patch: int) -> dict[str, Any]:
    """The floor of ``propagation``: the first frame's mask in every frame."""
    masks = clips.patch_masks(patch)
    return mean_of(_region_similarity(masks[:, :1].expand_as(masks), clips.inside))


def _region_similarity(masks: Tensor, inside: Tensor) -> Tensor:
    """IoU of each clip [n]: patch masks enlarged bilinearly, cut at one half."""
    n, frames, tokens = masks.shape
    side = math.isqrt(tokens)
    grid = masks.reshape(n * frames, 1, side, side)
    large = F.interpolate(grid, size=inside.shape[-2:], mode="bilinear").view_as(inside)
    found = (large >= 0.5)[:, 1:]
    both, either = (found & inside[:, 1:]).sum((2, 3)), (found | inside[:, 1:]).sum((2, 3))
    return (both / either.clamp_min(1)).double().mean(1)


def mean_of(values: Tensor) -> dict[str, Any]:
    """Mean of shares [n] in percent, as ``top1``, with its normal 95 % interval."""
    mean = 100 * values.mean().item()
    half = 100 * 1.959964 * values.std().item() / math.sqrt(len(values))
    return {
        "top1": round(mean, 2),
        "ci95": [round(max(0.0, mean - half), 2), round(min(100.0, mean + half), 2)],
    }


def clip_tokens(encode: Encode, clips: Scenes, batch_size: int, device: str) -> Tensor:
    """Tokens of all frames, [n, FRAMES, N, F]."""
    tokens = tokens_of(encode, clips.images.flatten(0, 1), batch_size, device)
    return tokens.view(-1, FRAMES, *tokens.shape[1:])
