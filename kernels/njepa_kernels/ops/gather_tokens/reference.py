"""The specification of gather_tokens in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..._runtime.rows import compute_dtype, gather_rows


def gather_tokens_reference(
    x: torch.Tensor, idx: torch.Tensor, pos: torch.Tensor | None = None
) -> torch.Tensor:
    """x[b, idx] + pos[idx], the sum in fp32, returned in the type of x."""
    rows = gather_rows(x, idx)
    if pos is None:
        return rows
    dtype = compute_dtype(x, pos)
    return (rows.to(dtype) + F.embedding(idx, pos.to(dtype))).to(x.dtype)
