"""Stand-ins for the packed kernels that need a GPU, by a block-diagonal mask through SDPA.

They keep to the interfaces of torch 2.11 to 2.15 and of xformers 0.0.35 / mslk, so that everything
but the foreign kernels themselves runs on a CPU.
"""

from __future__ import annotations

import types
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import pairwise

import torch
from torch.nn import functional as F

from njepa.models.attention import Attention
from njepa.models.attention_kernels import Varlen, Xformers


def block_diagonal(q, k, v, q_counts, k_counts):
    """Packed q [Tq, H, h] and k, v [Tk, H, h]; sequence i of q sees sequence i of k and v."""
    assert len(q) == sum(q_counts)
    assert len(k) == len(v) == sum(k_counts)
    of = [torch.arange(len(c)).repeat_interleave(torch.tensor(c)) for c in (q_counts, k_counts)]
    mask = (of[0][:, None] == of[1][None]).to(q.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
    counts = []
    for cu, longest in ((cu_seq_q, max_q), (cu_seq_k, max_k)):
        assert cu.dtype == torch.int32
        counts.append([b - a for a, b in pairwise(cu.tolist())])
        assert max(counts[-1]) == longest
    return block_diagonal(query, key, value, *counts)


class BlockDiagonalMask:
    def __init__(self, q_counts, k_counts):
        self.counts = q_counts, k_counts

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert isinstance(q_seqlen, list)
        assert device is not None  # without it xformers takes the first GPU
        return cls(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen)


def memory_efficient_attention(query, key, value, attn_bias=None):
    if attn_bias is None:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        return out.transpose(1, 2)
    assert len(query) == len(key) == 1
    return block_diagonal(query[0], key[0], value[0], *attn_bias.counts).unsqueeze(0)


def fake_fmha(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.BlockDiagonalMask = BlockDiagonalMask
    module.memory_efficient_attention = partial(memory_efficient_attention)  # one for each module
    return module


VARLEN = Varlen(varlen_attn)
XFORMERS = Xformers(memory_efficient_attention, BlockDiagonalMask.from_seqlens)
#: The three ways through the blocks: padded with a mask, and packed for either kernel.
ATTENTION = {
    "padded": Attention(),
    "varlen": Attention(VARLEN, VARLEN),
    "xformers": Attention(XFORMERS, XFORMERS),
}
