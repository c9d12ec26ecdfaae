"""The transformer block of encoder and predictors, with the parameter names of timm's.

Shapes: rows of tokens [..., D], H heads of width e, D = H*e. How the rows lie and which of them ask
is the layout's business: ``Sequences`` (attention.py) or ``Segments`` (shared_context.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Layout(Protocol):
    """Which token attends to which."""

    def attend(self, qkv: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(e)) v of the tokens that ask: [..., 3, H, e] to [..., H*e]."""
        ...

    def take_queries(self, x: Tensor) -> Tensor:
        """Of all tokens those that ask; all of them unless some only give keys and values."""
        ...


class BlockNorm(nn.LayerNorm):
    """LayerNorm with the published eps, 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases and without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Tokens [..., D] in, those that ask out."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        out: Tensor = self.proj(layout.attend(qkv))
        return out


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), GELU by erf."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block, for the tokens that ask.

        q = q + proj(softmax(q k^T / sqrt(e)) v),   q, k, v from qkv(norm1(x))
        q = q + mlp(norm2(q))

    Where all tokens ask, that is timm's ``Block``: same parameters, names and values. Where some
    only give keys and values, as the context does in a predictor's last block, the values and
    gradients at the places of q are the same, and what nobody reads is not computed. The other
    tokens' row of the product with qkv stays: its weight is not sliced, which ZeRO 3 gathers inside
    of its own module only.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = BlockNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = BlockNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Tokens [..., D] in, those that ask out."""
        q: Tensor = layout.take_queries(x) + self.attn(self.norm1(x), layout)
        q = q + self.mlp(self.norm2(q))
        return q


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, layout: Layout, recompute: bool) -> Tensor:
    """``x`` through the blocks.

    Args:
        recompute: keep each block's input alone, and compute what its backward needs again there
            (activation checkpointing): the same gradients, about a third more arithmetic.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            # The blocks draw no random numbers, so there is no generator to restore.
            x = checkpoint(block, x, layout, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, layout)
    return x
