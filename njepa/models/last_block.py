"""The last block of a predictor, of which only the queries are read."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor

from njepa.models.attention import Sequences
from njepa.models.shared_context import Segments


class LastBlock(Block):
    """timm's ``Block`` for its queries q alone, among tokens x that all give keys and values.

        q = q + proj(softmax(q k^T / sqrt(h)) v),   q, k, v from qkv(norm1(x))
        q = q + mlp(norm2(q))

    The same numbers that ``Block`` has at the places of q, and the same gradients. What it computes
    at the others besides k and v (their attention, projection, second norm and MLP) nobody reads.
    Their row of the product with qkv stays: its weight is not sliced, which ZeRO 3 gathers inside
    of its own module only. Parameters, their names and the order of their draws are those of
    ``Block``.
    """

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        """Tokens as the other blocks take them; out [R, Kt, d], or rows [R*Kt, d] of ``Segments``.

        Args:
            attn_mask: the queries over all tokens, from ``Sequences.over`` or
                ``Segments.of_queries_alone``.
        """
        assert isinstance(attn_mask, Sequences | Segments)
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        q = attn_mask.take_queries(x) + self.drop_path1(self.ls1(attended))
        out: Tensor = q + self.drop_path2(self.ls2(self.mlp(self.norm2(q))))
        return out
