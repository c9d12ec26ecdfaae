"""Frozen tokens of the images of a source, for probes that look at each of them many times."""

from __future__ import annotations

import torch
from torch import Tensor

from njepa.data.eval_views import eval_images
from njepa.evaluation.images import stream
from njepa.evaluation.subject import Subject
from njepa.evaluation.task import Side

HELD = 4e9  # bytes of tokens at most that are kept in memory, on the device of the encoder


class TokenStore:
    """Call it with sample numbers int64 [B] for their tokens, float32 [B, N, D].

    Tokens are computed once and kept in half precision where they fit into ``HELD`` bytes (they are
    normalised, so that rounds them by a thousandth at most), else from the files at every call.
    """

    def __init__(self, subject: Subject, side: Side, batch_size: int, device: str) -> None:
        self._subject, self._side, self._device = subject, side, device
        size, patch = subject.image_size, subject.weights.patch_size
        numbers = len(side.ids) * (size // patch) ** 2 * subject.weights.width
        self._held: Tensor | None = None
        if 2 * numbers <= HELD:
            batches = stream(side.index, side.ids, size, batch_size)
            self._held = torch.cat([self._encode(images).half() for images in batches])

    def __call__(self, numbers: Tensor) -> Tensor:
        if self._held is not None:
            return self._held[numbers].float()
        ids = self._side.ids[numbers.cpu().numpy()]
        images = eval_images(self._side.index, ids, self._subject.image_size)
        return self._encode(images)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        encoder = self._subject.encoder
        tokens: Tensor = encoder(images.to(self._device).permute(0, 2, 3, 1)).float()
        return tokens
