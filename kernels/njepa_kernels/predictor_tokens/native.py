"""predictor_tokens in C++ (csrc/cpu/tokens.cpp) and CUDA (csrc/cuda/tokens.cu).

Contiguous inputs, indices in range.
"""

from __future__ import annotations

import torch

from .._native import ops
from .._philox import MASK32

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def forward(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    seed: int,
    step: int,
    sample_ids: torch.Tensor | None,
    mix: str,
) -> torch.Tensor:
    """[M*B, Kc+Kt, d] in the type of context; sigma is fp32 [B, M, Kt] or None."""
    out: torch.Tensor = ops(context.device.type).predictor_tokens_forward(
        context,
        pos.float(),
        mask_token.float(),
        context_idx,
        target_idx,
        sigma,
        seed & MASK32,
        step & MASK32,
        sample_ids,
        mix,
    )
    return out


def backward(
    grad: torch.Tensor,
    pos: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    seed: int,
    step: int,
    sample_ids: torch.Tensor | None,
    mix: str,
    need_pos: bool,
    need_sigma: bool,
) -> Gradients:
    """dcontext in the type of grad; dmask_token, dpos and dsigma in fp32."""
    dcontext, dmask_token, dpos, dsigma = ops(grad.device.type).predictor_tokens_backward(
        grad,
        pos.float(),
        context_idx,
        target_idx,
        sigma,
        seed & MASK32,
        step & MASK32,
        sample_ids,
        mix,
        need_pos,
        need_sigma,
    )
    return dcontext, dmask_token, dpos if need_pos else None, dsigma if need_sigma else None
