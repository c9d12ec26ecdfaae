"""Transformer blocks one after another, with or without their activations kept for the backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool, **inputs: Any) -> Tensor:
    """``x`` through the blocks.

    Args:
        recompute: keep each block's input alone, and compute what its backward needs again there
            (activation checkpointing): the same gradients, about a third more arithmetic.
        inputs: further arguments of every block.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            # The blocks draw no random numbers, so there is no generator to restore.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **inputs)
        else:
            x = block(x, **inputs)
    return x
