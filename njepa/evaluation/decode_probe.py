"""``njepa probe --kind decode``: which tokens are decoded, and the picture that shows them."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from njepa.config import ConfigError
from njepa.evaluation.decode import (
    DRAWS,
    FACTOR,
    HIDDEN,
    SHOWN,
    STEPS,
    TEST,
    Column,
    Decoding,
    Measured,
    Result,
    context_only,
    images_to_learn_from,
    predictions,
    see,
    target_tokens,
)
from njepa.evaluation.predicting import Predicting
from njepa.evaluation.task import Task

CELL, GAP, HEAD, FOOT = 120, 10, 54, 50  # pixels of the picture
FRAME, SOFT = (255, 120, 0), (90, 90, 90)
LEGEND = (
    "Framed patches are hidden from the network. What fills them is decoded from features, blurred "
    "where these leave it open.",
    "explains: share of the variance of the hidden pixels of all test images; 0 %: a mean patch.",
)


def decode_probe(
    network: Predicting, task: Task, seed: int, device: str, floors: bool = True
) -> tuple[Result, list[Column]]:
    """Numbers on test images, and the columns of the picture.

    Args:
        floors: add the untrained network, the mean patch of each place, and that of all.

    Raises:
        ConfigError: fewer than two test images, masks that do not fit, or a run that diverged.
    """
    config, noise = network.config, network.config.noise
    if len(task.test.ids) < 2:
        raise ConfigError(
            f"--kind decode needs two test images or more for its intervals, got "
            f"{len(task.test.ids)}; give --test more images"
        )
    for module in (network.jepa, network.target):
        module.to(device)
    limit = images_to_learn_from(config, network.target.pos_embed.shape[-1])
    found = Decoding(
        config,
        see(task.train, config, limit, seed, device),
        see(task.test, config, TEST, seed, device),
        seed,
    )
    mean = found.without_network(found.mean.expand_as(found.at_place))
    reference = mean.errors

    clean = network.jepa.predicts[0]
    branch: Literal["clean", "noised"] = "clean" if clean else "noised"
    learnt = predictions(network, branch, seed)
    decoder = found.decoder(learnt, "predictions")
    measured: dict[str, Measured] = {}
    if clean:
        measured["prediction"] = found.measured(decoder, learnt, "predictions")
    if noise.active:
        for name, factor in (("noised", 1.0), ("noised_more", FACTOR)):
            predict = predictions(network, "noised", seed, DRAWS, factor)
            measured[name] = found.measured(decoder, predict, "noised predictions")
    target = target_tokens(network)
    measured["target"] = found.measured(found.decoder(target, "target features"), target, "target")
    below = {"mean": mean}
    if floors:
        untrained = network.untrained()
        untrained.jepa.to(device)
        predict = predictions(untrained, branch, seed)
        first = found.measured(found.decoder(predict, "untrained"), predict, "untrained")
        below = {"untrained": first, "place": found.without_network(found.at_place), **below}

    result: Result = {name: one.entry(reference) for name, one in measured.items()}
    if noise.active:
        sigma = list(noise.sigma) if isinstance(noise.sigma, tuple) else noise.sigma
        result["noise"] = {"sigma": sigma, "draws": DRAWS, "factor": {"noised_more": FACTOR}}
    if floors:
        result["floors"] = {name: one.entry(reference) for name, one in below.items()}
    result["decoder"] = {"parameters": found.parameters, "hidden": HIDDEN, "steps": STEPS}
    result["images"] = {"train": len(found.train.ids), "test": len(found.test.ids)}
    if network.assumed:
        result["assumed"] = network.assumed
    return result, _columns(found, measured, below["place"] if floors else mean, reference)


def _columns(
    found: Decoding, measured: dict[str, Measured], floor: Measured,
    reference: torch.Tensor,
) -> list[Column]:  # fmt: skip
    _, masks, _ = next(found.test.batches("masks"))
    images, patch = found.test.images[:SHOWN], found.test.patch
    context = context_only(images.to(found.test.device), masks, patch).cpu()
    hidden = torch.zeros(len(images), len(found.at_place), dtype=torch.bool)
    hidden.scatter_(1, masks.target_idx[: len(images)].flatten(1).cpu(), True)

    def note(one: Measured) -> str:
        return f"explains {max(one.entry(reference)['explained'], 0):.0f} %"

    columns = [
        Column("image", "", images, hidden),
        Column("context", "all that is seen", context),
        Column("average image", note(floor), floor.cells[0], hidden),
    ]
    for name, title, draws in (
        ("prediction", "prediction", 1),
        ("noised", "noise", DRAWS),
        ("noised_more", f"noise x {FACTOR:g}", 1),
        ("target", "target features", 1),
    ):
        if name in measured:
            several = [f", draw {i + 1}" * (draws > 1) for i in range(draws)]
            columns += [
                Column(title + draw, note(measured[name]), cell, hidden)
                for draw, cell in zip(several, measured[name].cells, strict=False)
            ]
    return columns


def sheet(columns: list[Column]) -> Image.Image:
    """The picture: a row for each image, headings above the columns, a legend below."""
    rows = len(columns[0].cells)
    width, top = (CELL + GAP) * len(columns) + GAP, HEAD + (CELL + GAP) * rows
    picture = Image.new("RGB", (width, top + FOOT), "white")
    draw = ImageDraw.Draw(picture)
    title, note = ImageFont.load_default(15), ImageFont.load_default(13)
    for x, column in enumerate(columns):
        left = GAP + x * (CELL + GAP)
        draw.text((left, 8), column.title, "black", title)
        draw.text((left, 30), column.note, SOFT, note)
        for y, cell in enumerate(column.cells):
            place = left, HEAD + y * (CELL + GAP)
            image = Image.fromarray(np.ascontiguousarray(cell.numpy()))
            small = image.width <= CELL
            how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            picture.paste(image.resize((CELL, CELL), how), place)
            if column.frames is not None:
                _frame(draw, column.frames[y], *place)
    for i, line in enumerate(LEGEND):
        draw.text((GAP, top + 4 + 19 * i), line, SOFT, note)
    return picture


def _frame(draw: ImageDraw.ImageDraw, patches: torch.Tensor, left: int, top: int) -> None:
    """Lines between patches [N] that are in and those that are not."""
    side = math.isqrt(len(patches))
    grid = np.pad(patches.view(side, side).numpy(), 1)
    for axis in (0, 1):
        for edge in np.argwhere(np.diff(grid, axis=axis)):
            # Between rows (axis 0) or columns (1); the padding shifts the other coordinate by one.
            start = edge - np.array([1 - int(k == axis) for k in (0, 1)])
            end = start + np.array([int(k != axis) for k in (0, 1)])
            points = [(left + CELL * x / side, top + CELL * y / side) for y, x in (start, end)]
            draw.line(points, FRAME, 2)
