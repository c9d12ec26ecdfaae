"""Scenes with known masks, and dense probes on tokens whose answer is known."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from njepa.data.shapes import CLASSES, render
from njepa.evaluation import dense
from njepa.evaluation.dense import mean_iou, propagate, propagation, segmentation, standing_still
from njepa.evaluation.scenes import FRAMES, scenes


def test_scenes_show_two_patterns_and_their_mask():
    clips = scenes("test", 20, 64, frames=3)
    again = scenes("test", 3, 64, frames=3)
    assert torch.equal(clips.images[:3], again.images)
    assert (clips.classes[:, 0] != clips.classes[:, 1]).all()
    assert clips.classes[:, 0].tolist() == [i % len(CLASSES) for i in range(20)]
    area = clips.inside.float().mean((2, 3))
    assert area.min() > 0.1
    assert area.max() < 0.5
    # At 64 px the view is the image enlarged to 73 and cut to its middle 64.
    background = torch.tensor(render("test", 5)).permute(2, 0, 1)
    from njepa.data.eval_views import central_view

    outside = ~clips.inside[5, 0]
    edge = torch.nn.functional.max_pool2d(clips.inside[5, :1].float(), 5, 1, 2)[0] > 0
    shown = central_view(background, 64)
    assert torch.equal(clips.images[5, 0][:, outside & ~edge], shown[:, outside & ~edge])
    assert not torch.equal(clips.images[5, 0], shown)
    assert (clips.inside[:, 0] != clips.inside[:, 2]).flatten(1).any(1).all()


def test_patch_labels_are_the_majority():
    clips = scenes("train", 6, 48)
    labels = clips.patch_labels(8)
    for i in range(6):
        for p in range(36):
            row, column = 8 * (p // 6), 8 * (p % 6)
            share = clips.inside[i, 0, row : row + 8, column : column + 8].double().mean()
            assert labels[i, 0, p] == clips.classes[i, int(share >= 0.5)]
            assert clips.patch_masks(8)[i, 0, p] == pytest.approx(share.item())


def test_mean_iou_is_scikit_learns():
    g = torch.Generator().manual_seed(0)
    predicted, wanted = torch.randint(0, 5, (2, 300), generator=g)
    expected = jaccard_score(wanted, predicted, average="macro")
    assert mean_iou(predicted, wanted) == pytest.approx(expected)


def test_segmentation_of_tokens_that_know_their_pattern():
    labels = scenes("train", 60, 48).patch_labels(8)[:, 0]
    tokens = torch.nn.functional.one_hot(labels, 16).float()
    known = segmentation(tokens[:40], labels[:40], tokens[40:], labels[40:])
    assert known["top1"] == 100
    assert known["miou"] == 100
    blank = segmentation(tokens[:40] * 0, labels[:40], tokens[40:], labels[40:])
    assert blank["top1"] < 40


def test_a_mask_follows_its_tokens():
    """Tokens that say object or background; the object moves one patch a frame, farther than the
    window reaches from where it was at first."""
    side, frames = 12, 7
    truth = torch.zeros(frames, side, side)
    for t in range(frames):
        truth[t, 2:5, 1 + t : 4 + t] = 1
    g = torch.Generator().manual_seed(0)
    meaning = torch.stack([1 - truth, truth], -1).flatten(1, 2)
    tokens = torch.cat([5 * meaning, torch.randn(frames, side * side, 6, generator=g)], -1)
    masks = propagate(tokens, truth[0].flatten())
    assert ((masks >= 0.5).float() == truth.flatten(1)).all()
    lost = propagate(torch.ones_like(tokens), truth[0].flatten())
    assert not ((lost >= 0.5).float() == truth.flatten(1)).all()


def test_propagation_beats_standing_still_only_with_features():
    clips = scenes("test", 12, 48, FRAMES)
    still = standing_still(clips, 8)
    shares = clips.patch_masks(8)
    known = torch.stack([1 - shares, shares], -1)
    followed = propagation(known, clips, 8)
    assert followed["top1"] > still["top1"] + 10
    shift = clips.inside.float()
    expected = [
        jaccard_score(shift[i, t].flatten(), _large(shares[i, 0]).flatten())
        for i in range(12) for t in range(1, FRAMES)
    ]  # fmt: skip
    assert still["top1"] == pytest.approx(100 * np.mean(expected), abs=0.01)


def _large(mask):
    grid = mask.view(1, 1, 6, 6)
    large = torch.nn.functional.interpolate(grid, size=(48, 48), mode="bilinear")
    return (large[0, 0] >= 0.5).float()


def test_patch_pixels_are_the_patches():
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    tokens = dense.patch_pixels(8)(images)
    block = images[1, 8:, :8].permute(2, 0, 1).flatten().float() / 255 - 0.5
    assert torch.equal(tokens[1, 2], block)
