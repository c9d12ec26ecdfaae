"""Ragged masks: every image keeps its whole context, and no other image decides anything."""

from __future__ import annotations

import numpy as np
import pytest

from njepa.config import MaskConfig
from njepa.draws.masks import MaskSampler


def sampler(compat: str, ragged: bool) -> MaskSampler:
    return MaskSampler(MaskConfig(compat=compat, min_keep=4, ragged=ragged), (12, 12), seed=5)


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_every_image_keeps_its_whole_context(compat: str):
    """What an image alone has: a batch of one is never cut."""
    ragged, dense = sampler(compat, True), sampler(compat, False)
    ids = np.arange(40, dtype=np.int64) * 7
    saved = []
    for step in range(4):
        masks, cut = ragged(step, ids), dense(step, ids)
        assert masks.context_idx.dtype == np.int64
        np.testing.assert_array_equal(masks.target_idx, cut.target_idx)
        np.testing.assert_array_equal(masks.lengths, cut.lengths)
        assert masks.context_idx.shape == (40, masks.lengths.max())
        assert cut.context_idx.shape == (40, masks.lengths.min())
        for row, n, own in zip(masks.context_idx, masks.lengths, ids, strict=True):
            whole = dense(step, np.array([own])).context_idx[0]
            np.testing.assert_array_equal(row[:n], whole)
            assert (row[n:] == 0).all()
        for row, n, kept in zip(masks.context_idx, masks.lengths, cut.context_idx, strict=True):
            assert set(kept) <= set(row[:n])
        saved.append(1 - cut.context_idx.size / masks.lengths.sum())
    assert min(saved) > 0.05


def test_what_the_cut_drops():
    """The first row of the table in docs/variants.md, ragged masks."""
    masks = MaskSampler(MaskConfig(ragged=True), (14, 14), seed=0)
    ids = np.arange(128, dtype=np.int64)
    lengths = np.stack([masks(step, ids + 128 * step).lengths for step in range(200)])
    assert lengths.min(axis=1).mean() == pytest.approx(60, abs=1)
    assert lengths.mean() == pytest.approx(91, abs=1)
    cut = 1 - lengths.min(axis=1) / lengths.mean(axis=1)
    assert cut.mean() == pytest.approx(0.345, abs=0.01)
    padding = 1 - lengths.mean(axis=1) / lengths.max(axis=1)  # docs/configuration.md, ragged masks
    assert padding.mean() == pytest.approx(0.28, abs=0.01)


def test_no_other_image_decides_anything():
    ragged, ids = sampler("fixed", True), np.arange(30, dtype=np.int64)
    whole, part = ragged(3, ids), ragged(3, ids[11:17])
    np.testing.assert_array_equal(part.lengths, whole.lengths[11:17])
    width = part.context_idx.shape[1]
    np.testing.assert_array_equal(part.context_idx, whole.context_idx[11:17, :width])
    assert (whole.context_idx[11:17, width:] == 0).all()
