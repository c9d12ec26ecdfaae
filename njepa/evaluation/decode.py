"""What a predictor expects behind the mask: its outputs, turned into pixels by a small decoder.

The network is frozen. For each kind of token a decoder of its own learns, on training images, the
pixels of the patch that the token stands for, by squared error; test images are then decoded once.
I-JEPA shows its predictor in this way with a diffusion model as the decoder (arXiv 2301.08243,
section 8); this one is an MLP, so what it cannot know comes out as an average, blurred.

Shapes: B images, M target blocks, Kt patches of each, D encoder width, O = 3 P² numbers of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from njepa_kernels import NoiseKey
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from njepa.config import Config, ConfigError
from njepa.data.batch import Masks, Noise, as_masks
from njepa.draws.masks import MaskSampler
from njepa.draws.sigmas import block_sigmas
from njepa.draws.streams import Int64Array, permutation, stream_seed
from njepa.evaluation.images import stream
from njepa.evaluation.predicting import Predicting
from njepa.evaluation.task import Side

TRAIN, TEST = 4096, 1024
"""Images at most, a random subset of each side."""
TOGETHER = 64  # images that share the sizes of their blocks, as those of a training batch do
HELD = 4e9  # bytes of tokens at most that a decoder learns from: larger networks get fewer images
HIDDEN, STEPS, BATCH, RATE = 512, 2000, 256, 1e-3
DRAWS, FACTOR = 3, 2.0
"""Noise drawn for each image, and how much stronger than the run's the second kind is."""
SHOWN = 8

Result = dict[str, Any]
#: Of images [B, S, S, 3], their masks and ids: tokens [B, M, Kt, D], once for each draw of noise.
Predict = Callable[[Tensor, Masks, Int64Array], list[Tensor]]
#: The same, decoded: pixels in [0, 1], [draws, B, M, Kt, O].
Show = Callable[[Tensor, Masks, Int64Array], Tensor]


@dataclass(frozen=True)
class Seen:
    """Images of one side, and masks that do not depend on who predicts."""

    images: Tensor
    """uint8 [n, S, S, 3]."""
    ids: Int64Array
    masks: list[Masks]
    """Of each ``TOGETHER`` images."""
    patch: int
    device: str

    def batches(self, what: str) -> Iterator[tuple[Tensor, Masks, Int64Array]]:
        parts = tqdm(
            self.images.split(TOGETHER), what, unit="batch", disable=None, leave=False
        )  # fmt: skip
        for i, (images, masks) in enumerate(zip(parts, self.masks, strict=True)):
            ids = self.ids[i * TOGETHER : (i + 1) * TOGETHER]
            yield images.to(self.device), masks.to(self.device), ids


@dataclass(frozen=True)
class Column:
    """A column of the picture."""

    title: str
    note: str
    cells: Tensor
    """uint8 [``SHOWN``, S, S, 3]."""
    frames: Tensor | None = None
    """bool [``SHOWN``, N]: patches to put a frame around."""


class Decoder(nn.Module):
    """mean patch + MLP(standardised token): [.., D] to pixels, black 0 and white 1, [.., O].

    One hidden layer of ``HIDDEN`` GELUs. The last layer starts at zero, so an untrained decoder
    gives the mean patch.
    """

    def __init__(self, tokens: Tensor, base: Tensor, seed: int) -> None:
        """``tokens`` [T, D]: what it will learn from; ``base`` [O]: the mean patch."""
        super().__init__()
        width = tokens.shape[1]
        self.register_buffer("mean", tokens.mean(0))
        self.register_buffer("std", tokens.std(0).clamp_min(1e-6))
        self.register_buffer("base", base)
        with torch.random.fork_rng(devices=[]):
            self.hidden, self.out = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, len(base))
        generator = torch.Generator().manual_seed(stream_seed(seed, "init/decoder"))
        nn.init.trunc_normal_(self.hidden.weight, std=width**-0.5, generator=generator)
        for parameter in (self.hidden.bias, self.out.weight, self.out.bias):
            nn.init.zeros_(parameter)
        self.to(base.device)

    def forward(self, tokens: Tensor) -> Tensor:
        x = (tokens - self.get_buffer("mean")) / self.get_buffer("std")
        pixels: Tensor = self.get_buffer("base") + self.out(F.gelu(self.hidden(x)))
        return pixels


def fit(tokens: Tensor, pixels: Tensor, base: Tensor, seed: int, what: str = "decoder") -> Decoder:
    """A decoder, trained on tokens [T, D] and the pixels behind them, uint8 [T, O].

    ``STEPS`` steps of AdamW on ``BATCH`` patches, learning rate from ``RATE`` to zero by a cosine.

    Raises:
        ConfigError: tokens that are not finite.
    """
    if not tokens.isfinite().all():
        raise ConfigError(
            f"{what} gives tokens that are not finite, expected numbers; the run has diverged, so "
            f"use an earlier checkpoint"
        )
    decoder = Decoder(tokens, base, seed)
    solver = torch.optim.AdamW(decoder.parameters(), lr=RATE, weight_decay=0.01)
    order, epoch = torch.empty(0, dtype=torch.int64), 0
    for step in tqdm(range(STEPS), what, unit="step", disable=None, leave=False):
        if not len(order):
            order, epoch = torch.from_numpy(permutation(seed, epoch, len(tokens))), epoch + 1
        rows, order = order[:BATCH].to(tokens.device), order[BATCH:]
        solver.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        solver.zero_grad()
        F.mse_loss(decoder(tokens[rows]), pixels[rows].float() / 255).backward()
        solver.step()
    return decoder.requires_grad_(False)


@torch.no_grad()
def see(side: Side, config: Config, limit: int, seed: int, device: str) -> Seen:
    """At most ``limit`` images of a side in random order, with masks of the run's own sampler."""
    ids = side.ids[permutation(seed, 0, len(side.ids))[:limit]]
    size, patch = config.data.image_size, config.model.patch_size
    batches = tqdm(
        stream(side.index, ids, size, TOGETHER), "images", -(-len(ids) // TOGETHER),
        unit="batch", disable=None, leave=False,
    )  # fmt: skip
    images = torch.cat([batch.permute(0, 2, 3, 1) for batch in batches])
    sampler, ragged = MaskSampler(config.mask, config.grid, seed, TOGETHER), config.mask.ragged
    masks = [
        as_masks(sampler(i // TOGETHER, ids[i : i + TOGETHER]), ragged)
        for i in range(0, len(ids), TOGETHER)
    ]
    return Seen(images, ids, masks, patch, device)


def images_to_learn_from(config: Config, width: int) -> int:
    """``TRAIN``, or as many images as have ``HELD`` bytes of tokens in the largest blocks."""
    blocks, _ = MaskSampler(config.mask, config.grid, 0, TOGETHER).possible_blocks()
    rows = config.mask.n_targets * max(math.prod(size) for size in blocks)
    return max(1, min(TRAIN, int(HELD / (4 * rows * width))))


def predictions(
    network: Predicting, branch: Literal["clean", "noised"], seed: int,
    draws: int = 1, factor: float = 1.0,
) -> Predict:  # fmt: skip
    """Outputs of the predictor, in the encoder's width; ``factor``: of the run's own σ."""
    config = network.config

    def predict(images: Tensor, masks: Masks, ids: Int64Array) -> list[Tensor]:
        blocks, found = masks.target_idx.shape[1], []
        for draw in range(draws):
            noise = None
            if config.noise.active:
                sigma = factor * block_sigmas(config.noise, blocks, seed, draw, ids)
                shared = config.noise.draw == "shared"
                key = NoiseKey(stream_seed(seed, "noise"), draw, torch.from_numpy(ids), shared)
                noise = Noise(torch.from_numpy(sigma).float(), key).to(images.device)
            rows = getattr(network.jepa(images, masks, noise), branch)
            # Rows are block by block, image by image.
            found.append(rows.float().unflatten(0, (blocks, len(images))).transpose(0, 1))
        return found

    return predict


def target_tokens(network: Predicting) -> Predict:
    """What the predictor is trained to give: layer-normed features of the target encoder."""

    def predict(images: Tensor, masks: Masks, ids: Int64Array) -> list[Tensor]:
        h = network.target(images).float()
        return [at_targets(F.layer_norm(h, h.shape[-1:]), masks)]

    return predict


def cut(images: Tensor, patch: int) -> Tensor:
    """Patches of images, [B, S, S, 3] to [B, N, O]."""
    side = images.shape[1] // patch
    grid = images.unflatten(1, (side, patch)).unflatten(3, (side, patch))
    patches: Tensor = grid.transpose(2, 3).flatten(1, 2).flatten(2)
    return patches


def join(patches: Tensor, patch: int) -> Tensor:
    """The images of patches, [B, N, O] to [B, S, S, 3]: ``cut`` backwards."""
    side = math.isqrt(patches.shape[1])
    grid = patches.unflatten(2, (patch, patch, 3)).unflatten(1, (side, side))
    images: Tensor = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return images


def at_targets(values: Tensor, masks: Masks) -> Tensor:
    """[B, N, F] to [B, M, Kt, F]."""
    image = torch.arange(len(values), device=values.device)[:, None, None]
    return values[image, masks.target_idx]


def pasted(images: Tensor, masks: Masks, decoded: Tensor, patch: int) -> Tensor:
    """Images uint8 with decoded blocks in their places; later blocks lie over earlier ones."""
    patches = cut(images, patch).clone()
    image = torch.arange(len(images), device=images.device)[:, None]
    for block in range(decoded.shape[1]):
        idx = masks.target_idx[: len(images), block]
        patches[image, idx] = (255 * decoded[:, block]).round().byte()
    return join(patches, patch)


def context_only(images: Tensor, masks: Masks, patch: int) -> Tensor:
    """Images uint8, grey where the context encoder sees nothing."""
    patches = torch.full_like(cut(images, patch), 128)
    for i, full in enumerate(cut(images, patch)):
        lengths = masks.context_lengths
        count = masks.context_idx.shape[1] if lengths is None else lengths.counts[i]
        kept = masks.context_idx[i, :count]
        patches[i, kept] = full[kept]
    return join(patches, patch)


@dataclass(frozen=True)
class Measured:
    errors: Tensor
    """float64 [n]: mean squared error of each test image, pixels in [0, 1]."""
    spread: float
    """Standard deviation of a pixel over the draws."""
    cells: list[Tensor]
    """The first images with what was decoded, uint8 [``SHOWN``, S, S, 3], of each draw."""

    def entry(self, reference: Tensor) -> Result:
        """Numbers with their 95 % intervals over images.

        ``explained`` is 1 - mse / mse of the mean patch, in percent; its interval is that of a
        ratio of means (delta method), so that images which are hard for all widen it less.
        """
        e, least = self.errors, 1e-12
        mse, floor = float(e.mean()), max(float(reference.mean()), least)
        share = 1 - mse / floor
        half = _half_width(e)
        half_share = _half_width((e - (1 - share) * reference) / floor)
        found: Result = {
            "mse": _digits(mse),
            "ci95": [_digits(max(0.0, mse - half)), _digits(mse + half)],
            "psnr": round(-10 * math.log10(max(mse, least)), 2),
            "explained": round(100 * share, 2),
            "explained_ci95": [round(100 * (share + s * half_share), 2) for s in (-1, 1)],
        }
        return found | ({"spread": _digits(self.spread)} if len(self.cells) > 1 else {})


@torch.no_grad()
def measure(show: Show, seen: Seen, what: str) -> Measured:
    """Decode all test images."""
    errors, variances, cells = [], [], list[Tensor]()
    for images, masks, ids in seen.batches(what):
        wanted = at_targets(cut(images, seen.patch), masks).float() / 255
        decoded = show(images, masks, ids)
        errors.append((decoded - wanted).square().double().mean((0, 2, 3, 4)))
        variances.append(decoded.var(0, correction=0).double().mean((1, 2, 3)))
        few = images[:SHOWN]
        cells = cells or [pasted(few, masks, one[:SHOWN], seen.patch).cpu() for one in decoded]
    spread = math.sqrt(float(torch.cat(variances).mean()))
    return Measured(torch.cat(errors).cpu(), spread, cells)


class Decoding:
    """Images of both sides and the numbers and pictures that were made of them."""

    def __init__(self, config: Config, train: Seen, test: Seen, seed: int) -> None:
        self.train, self.test, self.seed = train, test, seed
        # Pixels are whole numbers, so this sum is exact whatever its order.
        parts = train.images.split(TOGETHER)
        total = torch.stack([cut(x, train.patch).long().sum(0) for x in parts]).sum(0)
        self.at_place = (total / (255 * len(train.images))).float().to(train.device)
        self.mean = self.at_place.mean(0)
        self.parameters = 0

    @torch.no_grad()
    def _learn_from(self, predict: Predict, what: str) -> tuple[Tensor, Tensor]:
        tokens, pixels = [], []
        for images, masks, ids in self.train.batches(what):
            tokens.append(predict(images, masks, ids)[0].flatten(0, 2))
            pixels.append(at_targets(cut(images, self.train.patch), masks).flatten(0, 2))
        return torch.cat(tokens), torch.cat(pixels)

    def decoder(self, predict: Predict, what: str) -> Decoder:
        found = fit(*self._learn_from(predict, what), self.mean, self.seed, what)
        self.parameters = sum(p.numel() for p in found.parameters())
        return found

    def measured(self, decoder: Decoder, predict: Predict, what: str) -> Measured:
        def show(images: Tensor, masks: Masks, ids: Int64Array) -> Tensor:
            return torch.stack([decoder(x).clamp(0, 1) for x in predict(images, masks, ids)])

        return measure(show, self.test, what)

    def without_network(self, patches: Tensor) -> Measured:
        """Patches [N, O], the same for every image."""

        def show(images: Tensor, masks: Masks, ids: Int64Array) -> Tensor:
            return at_targets(patches.expand(len(images), -1, -1), masks)[None]

        return measure(show, self.test, "floor")


def _half_width(values: Tensor) -> float:
    return 1.959964 * float(values.std()) / math.sqrt(len(values))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
