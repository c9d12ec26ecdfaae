"""Initial weights, each module from its own random stream."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from njepa.config import ModelConfig
from njepa.draws.streams import stream_seed


def init_generator(seed: int, module: str) -> torch.Generator:
    """CPU generator of stream ``init/<module>``: no other module shifts its draws."""
    return torch.Generator().manual_seed(stream_seed(seed, f"init/{module}"))


@torch.no_grad()
def init_weights(module: nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """Draw every linear and convolution weight, in the order of ``modules()``; biases 0, norms 1.

    ``trunc_normal``: std 0.02, as published (facebookresearch/ijepa, src/helper.py
    ``init_model``). ``xavier``: uniform with gain ``init_gain``, fans of the stored matrix (qkv
    counts as one, a patch convolution as a linear layer), as in facebookresearch/mae.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if config.init == "xavier":
                flat = layer.weight.flatten(1)
                nn.init.xavier_uniform_(flat, gain=config.init_gain, generator=generator)
            else:
                nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def rescale_by_depth(blocks: Iterable[nn.Module]) -> None:
    """Divide the output projections of block l = 1, 2, ... by sqrt(2 l)."""
    for depth, block in enumerate(blocks, start=1):
        for name in ("attn.proj.weight", "mlp.fc2.weight"):
            block.get_parameter(name).div_(math.sqrt(2.0 * depth))
