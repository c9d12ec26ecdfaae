"""The patch embedding, from the bytes of the images."""

from __future__ import annotations

import torch
from njepa_kernels import Impl, patchify
from torch import Tensor, nn
from torch.nn import functional as F


class PatchProjection(nn.Conv2d):
    """The patch convolution of a ViT over bytes, of the wanted patches only.

    Parameters are those of ``Conv2d(3, width, patch_size, patch_size)``: weight [D, 3, p, p], bias
    [D]. It stays one module that owns and uses them, which ZeRO-3 needs to gather them in time.
    """

    def __init__(
        self,
        width: int,
        patch_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        impl: Impl = "auto",
    ) -> None:
        """``mean``, ``std``: per channel, for pixels in [0, 1]."""
        super().__init__(3, width, patch_size, patch_size)
        self.patch_size, self.mean, self.std, self.impl = patch_size, mean, std, impl

    def forward(self, images: Tensor, idx: Tensor | None = None) -> Tensor:
        """Project patches.

        Args:
            images: uint8 [B, S, S, 3].
            idx: int64 [B, K], the patches that are wanted, or None for all.

        Returns:
            [B, K, D] or [B, N, D].
        """
        device = images.device.type
        # Autocast would round the input of the linear layer: written rounded, it is read once less.
        low = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if low else self.weight.dtype
        patches = patchify(
            images, self.patch_size, self.mean, self.std, idx, out_dtype=dtype, impl=self.impl
        )
        return F.linear(patches, self.weight.flatten(1), self.bias)
