"""An encoder from wherever it is: our runs and exports, official files, timm, transformers.

``read_encoder`` for one encoder; ``open_weights`` for all that a source holds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from njepa.config import ConfigError
from njepa.exchange.sources import cached_repository, open_path
from njepa.exchange.weights import EncoderWeights, Weights, Which

__all__ = ["EncoderWeights", "Weights", "Which", "open_weights", "read_encoder"]


def read_encoder(source: str | Path, which: Which = "target") -> EncoderWeights:
    """An encoder from ``source``.

    Args:
        source: a run folder, a checkpoint, a folder that ``njepa export`` wrote, an official
            I-JEPA file, a folder of timm or of transformers (``IJepaModel``), a safetensors file,
            or the name of a repository in Hugging Face's cache on this machine.
        which: of sources that hold both; others give the one they have, and ``which`` of the
            result says so.

    Raises:
        ConfigError: not there, unknown, damaged, a pickle with code in it, or other tensors than
            an encoder of this family has. Nothing is unpickled, nothing is downloaded.
    """
    return open_weights(source).encoder(which)


def open_weights(source: str | Path) -> Weights:
    """What ``source`` holds (see ``read_encoder``)."""
    path = Path(source)
    if not path.exists():
        cached = cached_repository(str(source))
        if cached is None:
            raise ConfigError(
                f"{source} does not exist, nor is a repository of that name in Hugging Face's "
                f"cache on this machine; expected a run folder, a checkpoint, an exported folder, "
                f"an official .pth.tar, a folder of timm or transformers, or a .safetensors file"
            )
        return dataclasses.replace(open_path(cached), origin=f"{source} ({cached.name})")
    return open_path(path)
