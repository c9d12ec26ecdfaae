"""Multi-block masks: which patches of an image are context and which are targets (I-JEPA).

Source: Assran et al., arXiv:2301.08243, and facebookresearch/ijepa, src/masks/multiblock.py.
All blocks of one batch share two sizes (targets, context); places are drawn per image.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from njepa.config import ConfigError, MaskConfig
from njepa.draws.block_sizes import Size, block_size, possible_sizes
from njepa.draws.streams import Float64Array, Int64Array, stream_seed, uniform_of_step, words

BoolArray = npt.NDArray[np.bool_]
Sizes = tuple[Size, Size]

_log = logging.getLogger(__name__)
_FAILURES = 20  # draws of an image before it has to respect one target block less
_EFFORT = 2**30  # nanoseconds, roughly, for the lengths behind static shapes
_CHUNK = 4096  # images at a time: their patches stay in the cache


class DrawnMasks(NamedTuple):
    """Flat row-major patch numbers, ascending along the last axis."""

    context_idx: Int64Array
    """[G, Kc], the same Kc for every image; ragged: Kc of the largest, the others padded by 0."""
    target_idx: Int64Array
    """[G, M, Kt]; blocks of an image may overlap one another."""
    lengths: Int64Array
    """[G], the context patches of each image before any of them is cut off."""


class MaskSampler:
    """DrawnMasks of a batch as a pure function of (seed, micro_step, sample ids), without state.

    ``compat="fixed"``: a block may lie anywhere; contexts are cut to the shortest one of the given
    ids (pass the global batch) by a uniformly random choice of patches; an image whose context has
    no more than ``min_keep`` patches gets all its blocks drawn again.
    ``compat="upstream"``: the published behaviour. Blocks are at most (H-1, W-1) and their last
    admissible offset is never drawn; contexts keep their first patches, which prefers the top rows;
    only the context block is drawn again. Pass the ids of one rank.
    With ``ragged`` nothing is cut: every image keeps its whole context, whatever the others have.
    Both: after 20 failures of an image its context need not avoid the last target block, after 40
    the last two, and so on, so the sampler always ends. The first time is logged as a warning.

    With ``static_shapes`` the two sizes of a step fix Kc in advance (``context_counts``), so that
    (Kc, Kt) takes one value for each pair of sizes. An image with a shorter context, about one
    in two batches, gets all its blocks drawn again; places of the others are those without
    ``static_shapes``.

    Args:
        batch: how many ids a call will get; needed by ``static_shapes`` only.

    Attributes:
        counts: Kc of each pair of sizes (target, context); empty without ``static_shapes``.

    Raises:
        ConfigError: when built, if a block that these settings can draw has no more than
            ``min_keep`` patches, or (fixed) if two sizes leave no such context however they lie.
    """

    def __init__(self, config: MaskConfig, grid: Size, seed: int, batch: int | None = None) -> None:
        self.config, self.grid, self.seed, self.batch = config, grid, seed, batch
        self._spare = 1 if config.compat == "fixed" else 0
        self._largest = (grid[0] - 1 + self._spare, grid[1] - 1 + self._spare)
        self._patches = grid[0] * grid[1]
        self.overlapped = False  # whether a context ever had to share patches with targets
        self._check()
        self.counts: dict[Sizes, int] = {}
        if config.static_shapes:
            if batch is None or batch < 1:
                raise ValueError(f"mask.static_shapes needs batch >= 1, got batch={batch}")
            self.counts = context_counts(config, grid, batch)

    def block_sizes(self, micro_step: int) -> Sizes:
        """(h, w) of the target blocks and of the context block in this step, for any ids."""
        c = self.config
        r_target, r_context, *_ = uniform_of_step(self.seed, "mask_size", micro_step)
        return (
            block_size(r_target, c.target_scale, c.aspect_ratio, self.grid, self._largest),
            block_size(r_context, c.context_scale, (1.0, 1.0), self.grid, self._largest),
        )

    def __call__(self, micro_step: int, sample_ids: Int64Array) -> DrawnMasks:
        """DrawnMasks of the given samples, int64 [G].

        Places depend on each sample's id alone; the number Kc is the batch's, and with ``ragged``
        no more than the width of the padding.
        """
        if len(sample_ids) == 0:
            raise ValueError("masks need at least one sample id, got an empty array")
        sizes = self.block_sizes(micro_step)
        corners, keys, kept = self._draw(micro_step, sample_ids, sizes)
        lengths = kept.sum(axis=1)
        targets = self._targets(corners, sizes[0])
        if self.config.ragged:
            return DrawnMasks(_padded(kept, lengths), targets, lengths)
        count = self.counts.get(sizes) or int(lengths.min())
        if self.config.compat == "fixed":
            chosen = choose_random(kept, count, keys)
        else:
            chosen = kept & (kept.cumsum(axis=1, dtype=np.int32) <= count)
        # Each row of ``chosen`` holds as many patches as any other.
        flat = np.flatnonzero(chosen).reshape(len(sample_ids), count)
        flat -= np.arange(0, len(flat) * self._patches, self._patches)[:, None]
        return DrawnMasks(flat, targets, lengths)

    def _draw(
        self, micro_step: int, ids: Int64Array, sizes: Sizes
    ) -> tuple[Int64Array, Int64Array, BoolArray]:
        """Corners and words as ``_place``, and the context patches [G, N], enough in each row."""
        corners, keys = self._place(micro_step, ids, sizes, attempt=0)
        kept = self._context(corners, sizes, self.config.n_targets)
        least = self.counts.get(sizes, self.config.min_keep + 1)
        if kept.sum(axis=1).min() < least:
            self._redraw(micro_step, ids, sizes, corners, kept, least)
        return corners, keys, kept

    def _place(
        self, micro_step: int, ids: Int64Array, sizes: Sizes, attempt: int
    ) -> tuple[Int64Array, Int64Array]:
        """Corners [M+1, 2, G], (top, left) of the targets and the context, and a word [G]."""
        blocks = [sizes[0]] * self.config.n_targets + [sizes[1]]
        room = np.array(self.grid) + self._spare - np.array(blocks)  # [M+1, 2] offsets
        draws = words(self.seed, "mask_place", micro_step, ids, room.size + 1, attempt).T
        return (draws[:-1] * room.reshape(-1, 1) >> 32).reshape(*room.shape, -1), draws[-1]

    def _context(self, corners: Int64Array, sizes: Sizes, constraints: int) -> BoolArray:
        """Patches [G, N] of the context block outside of the first ``constraints`` targets."""
        kept = self._inside(corners[-1], sizes[1])
        if not self.config.allow_overlap:
            for corner in corners[:constraints]:
                kept &= ~self._inside(corner, sizes[0])
        return kept

    def _inside(self, corner: Int64Array, size: Size) -> BoolArray:
        """The patches [G, N] inside the blocks with the corners [2, G]."""
        rows, columns = _band(self.grid, size[0], 0), _band(self.grid, size[1], 1)
        inside: BoolArray = rows.take(corner[0], axis=0) & columns.take(corner[1], axis=0)
        return inside

    def _redraw(
        self,
        micro_step: int,
        ids: Int64Array,
        sizes: Sizes,
        corners: Int64Array,
        kept: BoolArray,
        least: int,
    ) -> None:
        """Draw the images with fewer than ``least`` context patches again, in place."""
        n_targets = self.config.n_targets
        # The first block that is drawn again. A new context block alone may not help: upstream, the
        # usual one has a single place. Published is what follows from min_keep only.
        first = 0 if self.config.compat == "fixed" or self.counts else n_targets
        failed = np.flatnonzero(kept.sum(axis=1) < least)
        for attempt in range(1, _FAILURES * n_targets + 1):
            if attempt == _FAILURES and not self.overlapped:
                self.overlapped = True
                _log.warning(
                    "%d of %d images have fewer than %d context patches after %d draws on a grid "
                    "of %dx%d and may share patches with their targets; lower mask.min_keep or "
                    "mask.target_scale%s (said once)",
                    len(failed), len(ids), least, _FAILURES, *self.grid,
                    ", or set mask.static_shapes=false" if self.counts else "",
                )  # fmt: skip
            again = corners[:, :, failed]
            again[first:] = self._place(micro_step, ids[failed], sizes, attempt)[0][first:]
            corners[:, :, failed] = again
            kept[failed] = self._context(again, sizes, n_targets - attempt // _FAILURES)
            failed = failed[kept[failed].sum(axis=1) < least]
            if len(failed) == 0:
                return

    def _targets(self, corners: Int64Array, size: Size) -> Int64Array:
        height, width = size
        corner = corners[:-1, 0] * self.grid[1] + corners[:-1, 1]  # [M, G]
        block = np.arange(height)[:, None] * self.grid[1] + np.arange(width)
        indices: Int64Array = np.ascontiguousarray(corner.T)[:, :, None] + block.ravel()
        return indices

    def possible_blocks(self) -> tuple[set[Size], set[Size]]:
        """Every size of the target blocks and of the context block that a step can draw."""
        c = self.config
        return (
            possible_sizes(c.target_scale, c.aspect_ratio, self.grid, self._largest),
            possible_sizes(c.context_scale, (1.0, 1.0), self.grid, self._largest),
        )

    def _check(self) -> None:
        c, (rows, columns) = self.config, self.grid
        targets, contexts = self.possible_blocks()
        for key, sizes in (("target_scale", targets), ("context_scale", contexts)):
            h, w = min(sizes, key=math.prod)
            if h * w <= c.min_keep:
                aspect = f" and mask.aspect_ratio={list(c.aspect_ratio)}" * (key == "target_scale")
                lower = f"set mask.min_keep to at most {h * w - 1}, " if h * w else ""
                raise ConfigError(
                    f"mask.{key}={list(getattr(c, key))}{aspect} on a grid of {rows}x{columns} "
                    f"patches draws blocks as small as {h}x{w} = {h * w} patches, expected more "
                    f"than mask.min_keep={c.min_keep}; {lower}raise mask.{key}, or use more "
                    f"patches (larger data.image_size or smaller model.patch_size)"
                )
        if c.compat == "upstream" or c.allow_overlap:
            return
        left, target, context = min(
            (math.prod(k) - _least_overlap(t, k, self.grid), t, k)
            for t in targets
            for k in contexts
        )
        if left <= c.min_keep:
            raise ConfigError(
                f"a target block of {target[0]}x{target[1]} patches leaves at most {left} of a "
                f"{context[0]}x{context[1]} context block on a grid of {rows}x{columns}, expected "
                f"more than mask.min_keep={c.min_keep}; lower mask.min_keep or "
                f"mask.target_scale={list(c.target_scale)}, raise "
                f"mask.context_scale={list(c.context_scale)}, or set mask.allow_overlap=true"
            )


def context_counts(config: MaskConfig, grid: Size, batch: int) -> dict[Sizes, int]:
    """The fixed Kc of each pair of sizes (target, context) under ``static_shapes``.

    Kc = round(E[shortest context of ``batch`` images | sizes]) = round(sum_k P(length >= k)^batch):
    the mean that the sampler has without ``static_shapes``. P is the share among images drawn by
    that sampler from a stream of its own. It does not depend on the run's seed, so Kc is a function
    of the arguments alone, on every rank and after a restart.
    """
    # A length k counts where all of the batch have at least k patches.
    return {
        sizes: max(round(float((survival**batch).sum())), config.min_keep + 1)
        for sizes, survival in _survivals(config.model_copy(update={"static_shapes": False}), grid)
    }


@lru_cache(maxsize=16)
def _survivals(config: MaskConfig, grid: Size) -> tuple[tuple[Sizes, Float64Array], ...]:
    """For each pair of sizes: P(an image keeps at least k context patches), k = 1, ..., N."""
    sampler = MaskSampler(config, grid, stream_seed(0, "mask_count"))
    sampler.overlapped = True  # its warnings would speak of images that nobody trains on
    targets, contexts = sampler.possible_blocks()
    pairs = sorted((target, context) for target in targets for context in contexts)
    patches = math.prod(grid)
    images = max(_CHUNK, _EFFORT // (len(pairs) * (600 + 4 * patches)))
    found = []
    for number, sizes in enumerate(pairs):
        histogram = np.zeros(patches + 1, dtype=np.int64)
        for start in range(0, images, _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, images), dtype=np.int64)
            kept = sampler._draw(number, ids, sizes)[2]
            histogram += np.bincount(kept.sum(axis=1), minlength=patches + 1)
        found.append((sizes, histogram[::-1].cumsum()[::-1][1:] / images))
    return tuple(found)


def choose_random(kept: BoolArray, count: int, keys: Int64Array) -> BoolArray:
    """``count`` of the kept patches in each row of [G, N], every choice equally likely.

    ``keys`` [G] are uint32 random words. Patch n of row g ranks by h(keys[g] + n c mod 2^32) with
    c = 2^32 / golden ratio and h the 32-bit finaliser of MurmurHash3; a smaller ``count`` keeps a
    subset of what a larger one keeps. (A Philox word for each patch takes seven times as long.)
    """
    steps = np.arange(kept.shape[1], dtype=np.uint32) * np.uint32(0x9E3779B9)
    # c is odd and h is a bijection: no two patches of a row are equal.
    rank = keys.astype(np.uint32)[:, None] + steps
    rank ^= rank >> np.uint32(16)
    rank *= np.uint32(0x85EBCA6B)
    rank ^= rank >> np.uint32(13)
    rank *= np.uint32(0xC2B2AE35)
    rank ^= rank >> np.uint32(16)
    kept_first = rank | (kept.view(np.int8) - np.int8(1)).astype(np.uint32)  # others: 2^32 - 1
    kept_first.partition(count - 1, axis=1)
    return kept & (rank <= kept_first[:, count - 1 : count])


def _padded(kept: BoolArray, lengths: Int64Array) -> Int64Array:
    """The kept patches of each row, [G, max(lengths)], with zeros behind them."""
    row, patch = np.nonzero(kept)
    padded = np.zeros((len(kept), lengths.max()), dtype=np.int64)
    padded[row, np.arange(len(row)) - (lengths.cumsum() - lengths)[row]] = patch
    return padded


def _least_overlap(a: Size, b: Size, grid: Size) -> int:
    return math.prod(max(0, i + j - side) for i, j, side in zip(a, b, grid, strict=True))


@lru_cache(maxsize=512)
def _band(grid: Size, side: int, axis: int) -> BoolArray:
    """Which patches [N] lie in a band of rows (axis 0) or columns (axis 1), per offset [.., N]."""
    place = np.indices(grid)[axis].ravel()
    offset = np.arange(grid[axis] - side + 1)[:, None]
    band: BoolArray = (place >= offset) & (place < offset + side)
    return band
