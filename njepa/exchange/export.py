"""``njepa export``: write a folder, compare it with our own features, put it in its place."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from njepa.config import ConfigError
from njepa.exchange.card import model_card
from njepa.exchange.reading import EncoderWeights, Weights, Which, open_weights

Format = Literal["timm", "transformers", "ijepa", "safetensors", "onnx"]
#: The module of each format.
FORMATS: dict[str, str] = {
    "timm": "njepa.exchange.timm",
    "transformers": "njepa.exchange.transformers",
    "ijepa": "njepa.exchange.ijepa",
    "safetensors": "njepa.exchange.plain",
    "onnx": "njepa.exchange.onnx",
}
#: Largest difference of a feature; features are behind a LayerNorm, so of size 1.
TOLERANCE = 1e-4


class Writer(Protocol):
    """What a module of ``FORMATS`` has."""

    LIBRARY: str

    def write(self, folder: Path, encoder: EncoderWeights, weights: Weights) -> str: ...

    def usage(self, encoder: EncoderWeights) -> str: ...

    def library_features(
        self, folder: Path, encoder: EncoderWeights, pixels: Tensor
    ) -> tuple[str, Tensor]: ...


def export(source: str, out: Path, form: Format, which: Which | None = None) -> str:
    """Write ``source``'s encoder into the new folder ``out``; returns what was done, for people.

    Args:
        source: what ``read_encoder`` takes.
        which: None: the target encoder; for ``ijepa`` the context encoder, which official files
            hold under ``encoder``.

    Raises:
        ConfigError: unreadable source, unwritable target.
        RuntimeError: the other library computes other features; nothing is left behind.
    """
    writer = cast(Writer, importlib.import_module(FORMATS[form]))
    _check_free(out)
    weights = open_weights(source)
    encoder = _choose(weights, which or ("context" if form == "ijepa" else "target"), which)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with _writable(out):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            holds = writer.write(temporary, encoder, weights)
        checked = compare(writer, temporary, encoder)
        card = model_card(encoder, weights, writer.LIBRARY, writer.usage(encoder), holds, checked)
        with _writable(out):
            (temporary / "README.md").write_text(card)
            os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    return (
        f"wrote {out}: {form}, {size / 1e6:.1f} MB, from {encoder.origin}\n{holds}\n{checked}\n"
        f"{out / 'README.md'} says how to load it"
    )


def compare(writer: Writer, folder: Path, encoder: EncoderWeights) -> str:
    """Features of two images of noise by the other library and by ours, in fp32.

    Raises:
        RuntimeError: they differ by more than ``TOLERANCE``.
    """
    generator = torch.Generator().manual_seed(0)
    side = encoder.image_size
    images = torch.randint(0, 256, (2, side, side, 3), generator=generator, dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.mean, encoder.std))
    pixels = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        ours = encoder.build()(images)
        try:
            library, theirs = writer.library_features(folder, encoder, pixels)
        except ImportError as error:
            return f"not compared with our features: {error.name or error} is not installed"
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{library} computes other features from {folder}: they differ by {difference:.3g}, "
            f"expected at most {TOLERANCE:g}; nothing was written"
        )
    return f"features by {library} equal ours within {difference:.1e} (fp32, images of noise)"


def _choose(weights: Weights, wanted: Which, asked: Which | None) -> EncoderWeights:
    """What was asked for; by default what the format wants, else the only one there is."""
    if asked is None and wanted not in weights.encoders and len(weights.encoders) == 1:
        wanted = "context" if "context" in weights.encoders else "target"
    return weights.encoder(wanted)


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror or error}); choose a folder that you may "
            f"write, on a disk with room for it"
        ) from None


def _check_free(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(
            f"{out} exists already and would be written over; name a new folder, or remove it"
        )
