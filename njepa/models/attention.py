"""Attention of the blocks, over sequences of equal or of unequal length.

Shapes: R sequences of at most L tokens, T tokens without padding, H heads of width h, D = H*h.

A model owns an ``Attention`` (a kernel for dense sequences, one for ragged ones) and says in its
forward how the sequences lie:

    sequences = self.attention.sequences(rows, length, lengths, tail)
    x = sequences.enter(x)                        # [R, L, D]; packing kernels: [1, T, D]
    for block in blocks:
        x = block(x, sequences)
    y = sequences.leave(x)                        # [R, L, D], zeros where there is padding
    y = sequences.last(x, n)                      # or only the last n tokens of each: [R, n, D]

Outside of the blocks everything is padded, [R, L, D]; only between ``enter`` and ``leave`` may it
be packed. What acts on tokens alone (norm, MLP, projection) may stand on either side.

``lengths`` are those of the B images. Sequence r = m*B + b has the tokens [0, lengths[b]) and the
last ``tail`` of the L: no tail and R = B in the encoder; tail = Kt and R = M*B, rows m*B + b, in
the predictor. Without lengths, or where they are all equal to L - tail, the sequences are dense: no
mask, no packing, the same bits.

From queries to keys of other lengths: ``queries.over(keys)``, two ``Sequences`` of equally many
rows; the kernel then takes q as ``queries`` lie and k, v as ``keys`` lie. A block takes all tokens,
as ``keys`` lie, and lets the last of each sequence ask.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from njepa.choice import Choice
from njepa.data.batch import Lengths


class Kernel(Protocol):
    """softmax(q k^T / sqrt(h)) v within each sequence."""

    @property
    def name(self) -> str: ...

    @property
    def packs(self) -> bool:
        """Whether ragged sequences come packed, [1, T, H, h], or padded, [R, L, H, h]."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        """[R, L, H, h] or packed [1, T, H, h] in, the shape of ``q`` out."""
        ...


@dataclass(eq=False)
class Sequences:
    """R sequences and how they lie while they pass through the blocks.

    Dense: no mask and no index. Padded: ``mask``. Packed: ``counts``, ``cu_seqlens``, ``index``.
    """

    kernel: Kernel
    rows: int
    """R."""
    length: int
    """L, with padding."""
    mask: Tensor | None = None
    """bool [R, L]: where there is a token."""
    counts: tuple[int, ...] | None = None
    """Tokens of each sequence, on the host."""
    cu_seqlens: Tensor | None = None
    """int32 [R+1]: where each sequence begins among the T tokens; T at the end."""
    index: Tensor | None = None
    """int64 [T]: place of each token among the R*L padded ones."""
    keys: Sequences | None = None
    """What the queries attend to; None: themselves."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What a kernel builds once for all blocks."""

    def over(self, keys: Sequences) -> Sequences:
        """The same queries, attending to ``keys``, sequence by sequence."""
        dense = self.mask is None and self.index is None
        return replace(self, kernel=keys.kernel if dense else self.kernel, keys=keys, memo={})

    def enter(self, x: Tensor) -> Tensor:
        """Padded [R, L, D] to what the kernel takes: the same, or packed [1, T, D]."""
        if self.index is None:
            return x
        return x.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def leave(self, x: Tensor) -> Tensor:
        """Back to padded [R, L, D], with zeros where there is no token."""
        if self.index is not None:
            flat = x.new_zeros(self.rows * self.length, x.shape[-1])
            return flat.index_copy(0, self.index, x[0]).view(self.rows, self.length, -1)
        if self.mask is not None:
            return x.masked_fill(~self.mask.unsqueeze(-1), 0.0)
        return x

    def last(self, x: Tensor, n: int) -> Tensor:
        """The last n tokens of each sequence, [R, n, ...], where none of them is padding."""
        if self.cu_seqlens is None:
            return x[:, self.length - n :]
        rows = self.cu_seqlens[1:, None] + torch.arange(-n, 0, device=x.device)
        return x[0].index_select(0, rows.flatten()).view(self.rows, n, *x.shape[2:])

    def take_queries(self, x: Tensor) -> Tensor:
        """Of tokens as ``keys`` lie those that ask: the last of each sequence, [R, L, ...]."""
        return x if self.keys is None else self.keys.last(x, self.length)

    def attend(self, qkv: Tensor) -> Tensor:
        """q, k and v [..., 3, H, h], as ``keys`` lie, to [..., H*h], as the queries lie."""
        q, k, v = qkv.unbind(2)
        return self.kernel(self.take_queries(q), k, v, self).flatten(2)


@dataclass(frozen=True)
class Sdpa:
    """torch's scaled_dot_product_attention; ragged sequences are padded and their keys masked."""

    products: bool = False
    """In bf16, where a gradient is needed, two products with the softmax in fp32 between them, as
    the published blocks have it: on a CPU SDPA's backward takes three to seven times as long."""
    name = "sdpa"
    packs = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        mask = (sequences.keys or sequences).mask
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        where = None if mask is None else mask[:, None, None]
        if self.products and q.dtype == torch.bfloat16 and q.requires_grad:
            return _by_products(q, k, v, where).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=where).transpose(1, 2)


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    out: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return out


@dataclass(frozen=True)
class Attention:
    """What runs the attention of a model, and why."""

    dense: Kernel = Sdpa()
    ragged: Kernel = Sdpa()
    reason: str = "torch's own"
    order: tuple[SDPBackend, ...] = ()
    """Backends that SDPA tries, in this order, inside of ``ordered()``; empty: torch's order."""

    def ordered(self) -> AbstractContextManager[None]:
        """SDPA follows ``order`` until the end of the ``with``, and torch's order from there on.

        torch keeps it for the whole process, and setting it takes longer than starting a kernel:
        around a step, not around a call.
        """
        return sdpa_kernel(list(self.order), set_priority=True) if self.order else nullcontext()

    def __str__(self) -> str:
        """As the start table shows it: ``sdpa (dense masks)``."""
        return str(Choice(self.ragged.name, self.reason))

    def sequences(
        self, rows: int, length: int, lengths: Lengths | None = None, tail: int = 0
    ) -> Sequences:
        """How ``rows`` sequences of ``length`` tokens, padding included, lie.

        Args:
            lengths: of the B images, before the tail; ``rows`` is a multiple of B. None: dense.
            tail: tokens at the end of every sequence, after the padding.
        """
        if lengths is None or min(lengths.counts) == length - tail:
            return Sequences(self.dense, rows, length)
        repeat = rows // len(lengths.counts)
        own = lengths.tensor.repeat(repeat)  # [R]
        if not self.ragged.packs:
            place = torch.arange(length, device=own.device)
            mask = (place < own[:, None]) | (place >= length - tail)
            return Sequences(self.ragged, rows, length, mask=mask)
        counts = tuple(n + tail for n in lengths.counts) * repeat
        ends = (own + tail).cumsum(0)
        place = torch.arange(sum(counts), device=own.device)
        row = torch.repeat_interleave(own + tail, output_size=len(place))
        within = place - (ends - own - tail)[row]
        padding = torch.where(within < own[row], 0, length - tail - own[row])
        return Sequences(
            self.ragged,
            rows,
            length,
            counts=counts,
            cu_seqlens=F.pad(ends, (1, 0)).int(),
            index=row * length + within + padding,
        )


#: SDPA as torch orders it, for every kind of sequences.
SDPA = Attention()
