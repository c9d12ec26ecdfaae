"""Helpers of the reference implementations: rows by index, and the type they compute in."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The widest of fp32 and the types given: "fp32 inside", while fp64 inputs stay fp64."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def gather_rows(x: torch.Tensor, idx: torch.Tensor, block_major: bool = False) -> torch.Tensor:
    """x[b, idx[b, ...]] for x [B, N, D] and idx [B, ...]: [B, ..., D].

    ``block_major`` swaps the first two dimensions of the result: idx [B, M, K] gives [M, B, K, D].

    An embedding look-up in the flattened [B*N, D] table: on CPU it is faster than ``torch.gather``
    and advanced indexing, forward and backward, and its backward sums duplicates in a fixed order.
    """
    batch, n, width = x.shape
    first = torch.arange(batch, device=x.device).view(-1, *([1] * (idx.dim() - 1))) * n
    flat = idx + first
    return F.embedding(flat.transpose(0, 1) if block_major else flat, x.reshape(batch * n, width))
