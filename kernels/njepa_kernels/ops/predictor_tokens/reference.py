"""The specification of predictor_tokens in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..._runtime.philox import NoiseKey, philox_normal
from ..._runtime.rows import compute_dtype


def predictor_tokens_reference(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None = None,
    noise: NoiseKey | None = None,
) -> torch.Tensor:
    """[context + pos, mask_token + pos + sigma n] per block, rows m*B + b, sums in fp32."""
    dtype = compute_dtype(context, pos, mask_token, sigma)
    batch, n_blocks, n_targets = target_idx.shape
    table = pos.to(dtype)
    kept = (context.to(dtype) + F.embedding(context_idx, table)).to(context.dtype)
    queries = F.embedding(target_idx.transpose(0, 1), table)
    if sigma is not None:
        assert noise is not None
        normals = philox_normal(noise, target_idx, pos.shape[1]).to(dtype)
        queries = queries + (sigma.to(dtype)[..., None, None] * normals).transpose(0, 1)
    queries = (mask_token.to(dtype) + queries).to(context.dtype)
    tokens = torch.cat((kept.expand(n_blocks, -1, -1, -1), queries), dim=2)
    return tokens.view(n_blocks * batch, kept.shape[1] + n_targets, pos.shape[1])
