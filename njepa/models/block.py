"""The transformer block of encoder and predictors, with the parameter names of timm's.

Shapes: rows of tokens [..., D], H heads of width e, D = H*e. How the rows lie and which of them ask
is the layout's business: ``Sequences`` (attention.py) or ``Segments`` (shared_context.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from njepa_kernels import AddLayerNorm, Impl, add_layer_norm, bias_gelu
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from njepa.models.architecture import Stack


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


class Pending(NamedTuple):
    """A residual stream whose last addition is left to the norm that reads it next."""

    branch: Tensor
    """[..., D], what attention or an MLP computed, in the type of its last product."""
    stream: Tensor
    """[..., D], what it is added to."""


class FusedNorm(BlockNorm):
    """``BlockNorm`` with the residual add before it, from the stream's type to the next product's.

    That is autocast's where it is on, else that of the input.
    """

    def __init__(self, width: int, impl: Impl) -> None:
        super().__init__(width)
        self.impl = impl

    def forward(  # type: ignore[override]  # nothing calls it as a LayerNorm
        self, x: Tensor | Pending
    ) -> AddLayerNorm:
        """LN of the stream, and the stream itself, added up; see ``add_layer_norm``."""
        stream = x.stream if isinstance(x, Pending) else x
        device = stream.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self._added(x, low)

    def _added(self, x: Tensor | Pending, dtype: torch.dtype | None) -> AddLayerNorm:
        branch, stream = x if isinstance(x, Pending) else (x, None)
        return add_layer_norm(
            branch, stream, self.weight, self.bias, self.eps, out_dtype=dtype, impl=self.impl
        )


class FusedLastNorm(FusedNorm):
    """Behind the last block: as ``BlockNorm`` the rows alone, in the type of the stream."""

    def forward(self, x: Tensor | Pending) -> Tensor:  # type: ignore[override]
        stream = x.stream if isinstance(x, Pending) else x
        return self._added(x, stream.dtype).out


class GeluLinear(nn.Linear):
    """GELU(x W^T + b): bias and GELU are one op."""

    def __init__(self, width: int, hidden: int, impl: Impl) -> None:
        super().__init__(width, hidden)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        return bias_gelu(F.linear(x, self.weight), self.bias, impl=self.impl)


class FusedMlp(Mlp):
    """``Mlp`` whose first layer ends with the GELU."""

    def __init__(self, width: int, hidden: int, impl: Impl) -> None:
        super().__init__(width, hidden)
        self.fc1 = GeluLinear(width, hidden, impl)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x))
        return out


class FusedBlock(Block):
    """``Block`` whose memory-bound parts are ops of ``njepa_kernels``.

    Parameters, names and, up to rounding, values are those of ``Block``. Under autocast the norms
    write the type of the next product, and bias and GELU are rounded once, not twice. What the MLP
    computes is added by the norm of whatever comes next, inside of the module that has its weight:
    ZeRO 3 gathers it there.
    """

    def __init__(self, width: int, heads: int, hidden: int, impl: Impl = "auto") -> None:
        super().__init__(width, heads, hidden)
        self.norm1 = FusedNorm(width, impl)
        self.norm2 = FusedNorm(width, impl)
        self.mlp = FusedMlp(width, hidden, impl)

    def forward(  # type: ignore[override]  # ``run_blocks`` calls it
        self, x: Tensor | Pending, layout: Layout
    ) -> Pending:
        """Tokens [..., D] in, those that ask out."""
        normed, stream = self.norm1(x)
        attended = self.attn(normed, layout)
        normed, stream = self.norm2(Pending(attended, layout.take_queries(stream)))
        return Pending(self.mlp(normed), stream)


def build_blocks(size: Stack, fused: bool, impl: Impl) -> nn.ModuleList:
    """The blocks of a stack, with torch's default weights; ``impl`` is for the fused ones."""
    shape = size.width, size.heads, size.hidden
    return nn.ModuleList(
        FusedBlock(*shape, impl) if fused else Block(*shape) for _ in range(size.depth)
    )


def build_last_norm(width: int, fused: bool, impl: Impl) -> nn.Module:
    """The norm behind the blocks of ``build_blocks``: takes what ``run_blocks`` returns."""
    return FusedLastNorm(width, impl) if fused else BlockNorm(width)


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor | Pending, layout: Layout, recompute: bool
) -> Tensor | Pending:
    """``x`` through the blocks.

    Args:
        recompute: keep each block's input alone, and compute what its backward needs again there
            (activation checkpointing): the same gradients, about a third more arithmetic.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            if isinstance(x, Pending):  # what is kept is one tensor
                x = x.stream + x.branch
            # The blocks draw no random numbers, so there is no generator to restore.
            x = checkpoint(block, x, layout, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, layout)
    return x
