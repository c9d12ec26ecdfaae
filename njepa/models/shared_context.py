"""Attention of the predictor whose blocks share one context.

Shapes: B images, L blocks of queries per image (its target blocks, twice where one predictor makes
both predictions), Kc context tokens, Kt queries per block, H heads of width e, d = H*e.

All tokens of a batch are rows of one matrix, each of them once:

    rows [B*Kc + L*B*Kt, d]:  b*Kc + i is token i of context b,  B*Kc + (l*B + b)*Kt + t is query t
                              of block l of image b

Norm, MLP and projections act on rows. Attention lets context b attend to itself, and block (l, b)
to context b and to itself. Of the last layer the context needs keys and values only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from njepa.data.batch import Lengths
from njepa.models.attention import Attention, Sequences


@dataclass(frozen=True, eq=False)
class Segments:
    """Where context and queries lie among the rows, and what attends to what."""

    batch: int
    n_blocks: int
    n_context: int
    n_targets: int
    context: Sequences | None
    """The context of each image, over itself. None: it has keys and values only."""
    queries: Sequences
    """The queries of each block, over context and themselves."""

    @classmethod
    def of(
        cls, attention: Attention, context: Tensor, target_idx: Tensor, lengths: Lengths | None
    ) -> Segments:
        """For a context [B, Kc, d], padded where there are ``lengths``, and targets [B, L, Kt]."""
        batch, n_context = context.shape[:2]
        n_blocks, n_targets = target_idx.shape[1:]
        rows = n_blocks * batch
        keys = attention.sequences(rows, n_context + n_targets, lengths, tail=n_targets)
        return cls(
            batch,
            n_blocks,
            n_context,
            n_targets,
            attention.sequences(batch, n_context, lengths),
            attention.sequences(rows, n_targets).over(keys),
        )

    def of_queries_alone(self) -> Segments:
        """The same rows, of which the queries ask and the context is only asked."""
        return replace(self, context=None)

    def take_queries(self, rows: Tensor) -> Tensor:
        """Rows [B*Kc + L*B*Kt, ...] as they are, or to those of the queries, [L*B*Kt, ...]."""
        return rows if self.context is not None else self.split(rows)[1].flatten(0, 2)

    def attend(self, qkv: Tensor) -> Tensor:
        """q, k and v of all rows, [..., 3, H, e], to [..., H*e] of those that ask."""
        return shared_context_attention(*self.split(qkv), self)

    def join(self, context: Tensor, queries: Tensor) -> Tensor:
        """[B, Kc, d] and [L*B, Kt, d] to rows [B*Kc + L*B*Kt, d]."""
        return torch.cat((context.flatten(0, 1), queries.flatten(0, 1)))

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B*Kc + L*B*Kt, ...] to views [B, Kc, ...] and [L, B, Kt, ...]."""
        of_context = (self.batch, self.n_context)
        of_queries = (self.n_blocks, self.batch, self.n_targets)
        context, queries = rows.split((math.prod(of_context), math.prod(of_queries)))
        return context.unflatten(0, of_context), queries.unflatten(0, of_queries)


def shared_context_attention(context: Tensor, queries: Tensor, segments: Segments) -> Tensor:
    """softmax(q k^T / sqrt(e)) v with the keys and values of the context computed once.

    Two calls of the attention kernel: the context over itself, then every block over the context's
    keys and values followed by its own. Those are copied once per block; the products that made
    them, the larger part by far, are not repeated. No shape depends on a value.

    Args:
        context: [B, Kc, 3, H, e], q, k and v of the context tokens.
        queries: [L, B, Kt, 3, H, e], those of the queries.

    Returns:
        [B*Kc + L*B*Kt, H*e], rows as in the head of this file; without ``segments.context`` those
        of the queries, [L*B*Kt, H*e].
    """
    repeated = context[:, :, 1:].expand(segments.n_blocks, *context[:, :, 1:].shape)
    keys_values = torch.cat((repeated, queries[:, :, :, 1:]), dim=2).flatten(0, 1)
    q = queries[:, :, :, 0].flatten(0, 1)
    of_queries = _attend(segments.queries, q, *keys_values.unbind(2))
    if segments.context is None:
        return of_queries
    of_context = _attend(segments.context, *context.unbind(2))
    return torch.cat((of_context, of_queries))


def _attend(sequences: Sequences, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[S, Lq, H, e] over two [S, Lk, H, e], each of S sequences by itself: [S*Lq, H*e]."""
    heads, keys = q.shape[2:], sequences.keys or sequences
    q = sequences.enter(q.flatten(2)).unflatten(2, heads)
    k, v = (keys.enter(x.flatten(2)).unflatten(2, heads) for x in (k, v))
    out = sequences.kernel(q, k, v, sequences).flatten(2)
    return sequences.leave(out).flatten(0, 1)
