"""The specification of predictor_tokens in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .._philox import philox_normal
from .._rows import compute_dtype

_SIGMA_DATA_SQUARED = 0.5  # EDM's sigma_d = 1/sqrt(2), the RMS of a sin-cos position vector


def _mix(psi: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor, mix: str) -> torch.Tensor:
    """The noised position; each form equals psi exactly where sigma = 0."""
    noised = psi + sigma * noise
    if mix == "ve":
        return noised
    if mix == "vp":
        return noised / (1.0 + sigma * sigma).sqrt()
    # sigma_d / sqrt(sigma^2 + sigma_d^2), written so that sigma = 0 gives exactly 1.
    return noised / (1.0 + sigma * sigma / _SIGMA_DATA_SQUARED).sqrt()


def predictor_tokens_reference(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    sample_ids: torch.Tensor | None = None,
    mix: str = "ve",
) -> torch.Tensor:
    """[context + pos, mask_token + mix(pos, sigma n)] per block, rows m*B + b, sums in fp32."""
    dtype = compute_dtype(context, pos, mask_token, sigma)
    batch, n_blocks, n_targets = target_idx.shape
    table = pos.to(dtype)
    kept = (context.to(dtype) + F.embedding(context_idx, table)).to(context.dtype)
    queries = F.embedding(target_idx.transpose(0, 1), table)
    if sigma is not None:
        assert sample_ids is not None
        noise = philox_normal(seed, step, sample_ids, target_idx, pos.shape[1]).to(dtype)
        level = sigma.to(dtype).unsqueeze(-1)
        level = level.unsqueeze(-1) if sigma.dim() == 2 else level
        queries = _mix(queries, level.transpose(0, 1), noise.transpose(0, 1), mix)
    queries = (mask_token.to(dtype) + queries).to(context.dtype)
    tokens = torch.cat((kept.expand(n_blocks, -1, -1, -1), queries), dim=2)
    return tokens.view(n_blocks * batch, kept.shape[1] + n_targets, pos.shape[1])
