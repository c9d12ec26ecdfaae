"""The published predictor with one context for all blocks (our variant), the long way.

Plain attention over all tokens of an image under a boolean mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def may_attend(n_context: int, n_blocks: int, n_targets: int) -> Tensor:
    """bool [T, T], row attends to column; tokens are [context | block 0 | block 1 | ...]."""
    owner = [-1] * n_context + [m for m in range(n_blocks) for _ in range(n_targets)]
    return torch.tensor([[key in (-1, query) for key in owner] for query in owner])


def dense_prediction(
    weights: dict[str, Tensor],
    heads: int,
    z: Tensor,
    context_idx: Tensor,
    target_idx: Tensor,
    noise: Tensor | float = 0.0,
) -> Tensor:
    """[M*B, Kt, D]; ``noise`` [B, M, Kt, d] is added to the positions of the queries."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    pos = weights["predictor_pos_embed"][0]
    n_blocks, n_targets, width = *target_idx.shape[1:], pos.shape[1]
    queries = weights["mask_token"][0] + pos[target_idx] + noise
    x = torch.cat((linear(z, "predictor_embed") + pos[context_idx], queries.flatten(1, 2)), dim=1)
    mask = may_attend(z.shape[1], n_blocks, n_targets).to(z.device)
    for layer in range(sum(name.endswith("norm1.bias") for name in weights)):
        prefix = f"predictor_blocks.{layer}"
        qkv = linear(norm(x, f"{prefix}.norm1"), f"{prefix}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
        mixed = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{prefix}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{prefix}.norm2"), f"{prefix}.mlp.fc1"))
        x = x + linear(hidden, f"{prefix}.mlp.fc2")
    features = linear(norm(x, "predictor_norm"), "predictor_proj")[:, z.shape[1] :]
    return features.unflatten(1, (n_blocks, n_targets)).transpose(0, 1).flatten(0, 1)
