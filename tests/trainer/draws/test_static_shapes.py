"""``mask.static_shapes``: few shapes, the same expected token counts, the same places."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from njepa.config import ConfigError, MaskConfig
from njepa.draws import masks as masking
from njepa.draws.masks import MaskSampler, context_counts

GRID = (14, 14)


def pair(
    compat: str, side: int, batch: int, seed: int = 0, **kw: Any
) -> tuple[MaskSampler, MaskSampler]:
    """A sampler without and one with static shapes."""
    plain = MaskConfig(compat=compat, **kw)
    static = MaskConfig(compat=compat, static_shapes=True, **kw)
    grid = (side, side)
    return MaskSampler(plain, grid, seed), MaskSampler(static, grid, seed, batch)


def ids_of(step: int, batch: int) -> np.ndarray:
    return np.arange(step * batch, (step + 1) * batch, dtype=np.int64)


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
@pytest.mark.parametrize(
    ("side", "batch", "steps", "kw"),
    [(14, 128, 400, {}), (14, 1024, 120, {}), (16, 128, 300, {}), (6, 64, 400, {"min_keep": 2})],
    ids=["14x14-b128", "14x14-b1024", "16x16-b128", "6x6-b64"],
)
def test_expected_token_counts_stay(
    compat: str, side: int, batch: int, steps: int, kw: dict[str, Any]
) -> None:
    """Step by step Kt is the same; Kc is, on average, for each pair of sizes and in all.

    The only bias is that of rounding a pair's mean to a whole number, at most 1/2.
    """
    plain, static = pair(compat, side, batch, **kw)
    differences = defaultdict(list)
    for step in range(steps):
        ids = ids_of(step, batch)
        before, after = plain(step, ids), static(step, ids)
        assert before.target_idx.shape == after.target_idx.shape
        sizes = static.block_sizes(step)
        assert after.context_idx.shape == (batch, static.counts[sizes])
        differences[sizes].append(static.counts[sizes] - before.context_idx.shape[1])
    everything = [d for found in differences.values() for d in found]
    spread = np.std([d - np.mean(found) for found in differences.values() for d in found])
    for found in (*differences.values(), everything):
        # ``spread`` is that of the shortest context in a batch; the sampler's own estimate of a
        # mean has an error as well, from images enough for some 32 batches or more.
        error = spread * math.sqrt(1 / len(found) + 1 / 32)
        assert abs(np.mean(found)) < 0.5 + 4 * error
    assert abs(np.mean(everything)) < 0.5 + 3.5 * spread / math.sqrt(steps)
    assert not static.overlapped


def test_the_batch_that_the_minimum_runs_over_matters() -> None:
    """Kc falls with the batch, by much more than the errors that the test above allows."""
    counts = [
        np.mean([*context_counts(MaskConfig(), GRID, batch).values()]) for batch in (1, 128, 1024)
    ]
    assert counts[0] > counts[1] + 20
    assert counts[1] > counts[2] + 4


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_only_images_with_too_short_a_context_are_drawn_again(compat: str) -> None:
    plain, static = pair(compat, 14, 128)
    redrawn = 0
    for step in range(8):
        ids = ids_of(step, 128)
        before, after = plain(step, ids), static(step, ids)
        count = static.counts[static.block_sizes(step)]
        alone = [plain(step, ids[i : i + 1]).context_idx[0] for i in range(128)]  # never cut
        short = np.array([len(context) < count for context in alone])
        moved = (before.target_idx != after.target_idx).any(axis=(1, 2))
        np.testing.assert_array_equal(moved, short)
        for i in np.flatnonzero(~short):
            assert np.isin(after.context_idx[i], alone[i]).all()
            if compat == "upstream":
                np.testing.assert_array_equal(after.context_idx[i], alone[i][:count])
        redrawn += short.sum()
    assert 0 < redrawn <= 3 * 8  # 0.5 an image and batch


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_masks_depend_on_seed_step_and_id_alone(compat: str) -> None:
    """Any part of a batch, in any order, has the masks that it has in the whole."""
    _, static = pair(compat, 14, 64)
    order = np.random.default_rng(0).permutation(64)[:40]
    for step in range(20):
        ids = ids_of(step, 64)
        whole, part = static(step, ids), static(step, ids[order])
        np.testing.assert_array_equal(part.context_idx, whole.context_idx[order])
        np.testing.assert_array_equal(part.target_idx, whole.target_idx[order])


def test_counts_do_not_depend_on_the_seed_and_are_found_again() -> None:
    config = MaskConfig(static_shapes=True)
    first = MaskSampler(config, GRID, 0, 128).counts
    masking._survivals.cache_clear()
    assert MaskSampler(config, GRID, 77, 128).counts == first
    assert len(first) == 10  # five sizes of targets, two of the context block


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    compat=st.sampled_from(["fixed", "upstream"]),
    rows=st.integers(4, 16),
    columns=st.integers(4, 16),
    targets=st.integers(1, 6),
    scale=st.tuples(st.floats(0.1, 0.3), st.floats(0.1, 0.3)).map(sorted).map(tuple),
    min_keep=st.integers(0, 8),
    overlap=st.booleans(),
    batch=st.integers(1, 20),
)
def test_any_valid_configuration_gives_valid_masks(
    compat: str, rows: int, columns: int, targets: int, scale: tuple[float, float],
    min_keep: int, overlap: bool, batch: int,
) -> None:  # fmt: skip
    config = MaskConfig(
        compat=compat, n_targets=targets, target_scale=scale, min_keep=min_keep,
        allow_overlap=overlap, static_shapes=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_EFFORT", 1)  # few images: any Kc has to work
        masking._survivals.cache_clear()
        try:
            masks = MaskSampler(config, (rows, columns), 0, batch)
        except ConfigError:
            return  # what the sampler refuses without static shapes too
    masking._survivals.cache_clear()
    for step in range(3):
        context, target, _ = masks(step, ids_of(step, batch))
        count = masks.counts[masks.block_sizes(step)]
        assert context.shape == (batch, count)
        assert count > min_keep
        assert (np.diff(context, axis=-1) > 0).all()
        assert context.min() >= 0
        assert context.max() < rows * columns
        if not overlap and not masks.overlapped:
            assert not any(np.isin(c, t).any() for c, t in zip(context, target, strict=True))


def test_a_count_that_cannot_be_met_ends_with_overlap_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """More context than any places leave: constraints are dropped, as for ``min_keep``."""
    _, static = pair("fixed", 14, 8)
    for sizes in static.counts:
        static.counts[sizes] = 160  # a 13x13 block without any target has 169
    with caplog.at_level(logging.WARNING, logger="njepa.draws.masks"):
        context, target, _ = static(0, ids_of(0, 8))
    assert context.shape == (8, 160)
    assert any(np.isin(c, t).any() for c, t in zip(context, target, strict=True))
    assert static.overlapped
    assert "fewer than 160 context patches" in caplog.text
    assert "mask.static_shapes=false" in caplog.text


@pytest.mark.parametrize("batch", [None, 0])
def test_the_batch_must_be_given(batch: int | None) -> None:
    with pytest.raises(ValueError, match=r"static_shapes needs batch >= 1, got batch="):
        MaskSampler(MaskConfig(static_shapes=True), GRID, 0, batch)
