"""gather_tokens in C++ (csrc/cpu/gather_tokens.*). Contiguous inputs, indices in range."""

from __future__ import annotations

import torch

from ..._runtime.native import ops


def forward(x: torch.Tensor, idx: torch.Tensor, pos: torch.Tensor | None) -> torch.Tensor:
    """x[b, idx] + pos[idx], [B, K, D] in the type of x."""
    table = None if pos is None else pos.float()
    out: torch.Tensor = ops().gather_tokens_forward(x, idx, table)
    return out


def backward(
    grad: torch.Tensor, idx: torch.Tensor, n: int, need_pos: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx [B, n, D] in the type of grad, dpos [n, D] in fp32."""
    dx, dpos = ops().gather_tokens_backward(grad, idx, n, need_pos)
    return dx, dpos if need_pos else None
