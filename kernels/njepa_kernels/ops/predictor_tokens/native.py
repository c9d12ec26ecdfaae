"""predictor_tokens in C++ and CUDA (csrc/*/predictor_tokens.*).

Contiguous inputs, indices in range.
"""

from __future__ import annotations

import torch

from ..._runtime.native import ops
from ..._runtime.philox import NoiseKey, words_of

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def forward(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None,
    noise: NoiseKey | None,
) -> torch.Tensor:
    """[M*B, Kc+Kt, d] in the type of context; sigma is fp32 [B, M] or None."""
    out: torch.Tensor = ops(context.device.type).predictor_tokens_forward(
        context,
        pos.float(),
        mask_token.float(),
        context_idx,
        target_idx,
        sigma,
        *words_of(noise),
    )
    return out


def backward(
    grad: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    noise: NoiseKey | None,
    n: int,
    need_pos: bool,
    need_sigma: bool,
) -> Gradients:
    """dcontext in the type of grad; dmask_token, dpos [n, d] and dsigma [B, M] in fp32."""
    dcontext, dmask_token, dpos, per_token = ops(grad.device.type).predictor_tokens_backward(
        grad,
        context_idx,
        target_idx,
        *words_of(noise),
        n,
        need_pos,
        need_sigma,
    )
    dsigma = per_token.sum(-1) if need_sigma else None
    return dcontext, dmask_token, dpos if need_pos else None, dsigma
