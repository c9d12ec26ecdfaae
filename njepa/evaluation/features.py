"""Frozen features of images: an encoder's tokens, pooled; computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from njepa.atomic import replacing
from njepa.config import Config
from njepa.evaluation.images import LabelledImages
from njepa.models.encoder import Encoder
from njepa.runs.place import moved

logger = logging.getLogger(__name__)

#: Features of a batch of images, uint8 [B, S, S, 3], by the name of their view: [B, F] each.
Views = Callable[[Tensor], dict[str, Tensor]]

_FORMAT = 1  # of a cached file, and of what the views mean; another number computes them again
_LAST = 4


def pool(tokens: Tensor) -> Tensor:
    """Mean over the tokens, [B, N, D] to float32 [B, D]."""
    return tokens.float().mean(1)


def pooled_views(encoder: Encoder) -> Views:
    """``mean``: mean of the last layer's tokens; ``last4``: those of the last four blocks, joined.

    The final norm is applied to each of the four, as to the last one. I-JEPA reports the better of
    the two (arXiv 2301.08243, appendix A); a shallower network joins all of its blocks.
    """
    blocks = list(encoder.blocks)[-_LAST:-1]

    def views(images: Tensor) -> dict[str, Tensor]:
        earlier: list[Tensor] = []

        def keep(module: nn.Module, args: object, out: Tensor) -> None:
            earlier.append(pool(encoder.norm(out)))

        with _hooked(blocks, keep):
            mean = pool(encoder(images))
        return {"mean": mean, "last4": torch.cat([*earlier, mean], dim=1)}

    return views


@contextmanager
def _hooked(blocks: Iterable[nn.Module], keep: Callable[..., None]) -> Iterator[None]:
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def extract(
    views: Views, batches: Iterable[Tensor], device: torch.device | str
) -> dict[str, Tensor]:
    """Features of all images, float32 [n, F] on the CPU for each view.

    Args:
        batches: uint8 [B, 3, S, S].
    """
    rows: dict[str, list[Tensor]] = {}
    for batch in batches:
        moved()
        for name, value in views(batch.to(device).permute(0, 2, 3, 1)).items():
            rows.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in rows.items()}


def pooled_features(
    encode: Callable[[Tensor], Tensor], data: LabelledImages, config: Config, device: torch.device
) -> Tensor:
    """Mean over tokens of ``encode(images)`` ([B, N, D]): float32 [n, D] on the CPU."""
    batches = data.batches(config.eval.batch_size)
    return extract(lambda images: {"mean": pool(encode(images))}, batches, device)["mean"]


def standardised(train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both [n, F] with the mean 0 and the deviation 1 that each feature has over ``train``."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    return (train - mean) / std, (other - mean) / std


def raw_pixels(images: Tensor, side: int = 16) -> Tensor:
    """The floor to beat: images [B, 3, S, S] shrunk to ``side`` x ``side``, float32 [B, F]."""
    small = nn.functional.interpolate(
        images.float(), size=(side, side), mode="bilinear", antialias=True
    )
    return (small / 255 - 0.5).flatten(1)


def pixel_views(images: Tensor) -> dict[str, Tensor]:
    """``raw_pixels`` as views."""
    return {"pixels": raw_pixels(images.permute(0, 3, 1, 2))}


def cached(
    folder: Path, facts: dict[str, object], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """``compute()``, or what it gave before for the same ``facts``.

    Args:
        folder: files ``features-<key>.safetensors``; created if missing.
        facts: all that decides the result (digests of encoder and source, view), as JSON values.
    """
    text = json.dumps({"format": _FORMAT, **facts}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    file = folder / f"features-{key}.safetensors"
    found = _load(file, text)
    if found is None:
        found = compute()
        _save(file, found, text)
    return found


def _load(file: Path, facts: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("facts") != facts:
                return None
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged and will be computed again: %s", file, error)
        return None


def _save(file: Path, features: dict[str, Tensor], facts: str) -> None:
    """A full or read-only disk costs the cache and nothing else."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in features.items()}
        with replacing(file) as temporary:
            save_file(tensors, temporary, metadata={"facts": facts})
    except (OSError, SafetensorError) as error:
        logger.warning("features are not kept in %s: %s", file.parent, error)
