"""The specification of bias_gelu in plain PyTorch."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from ..._runtime.rows import compute_dtype

Approximate = Literal["none", "tanh"]


def bias_gelu_reference(
    x: torch.Tensor, bias: torch.Tensor, approximate: Approximate = "none"
) -> torch.Tensor:
    """GELU(x + bias) in fp32, in the type of ``x``."""
    dtype = compute_dtype(x, bias)
    return F.gelu(x.to(dtype) + bias.to(dtype), approximate=approximate).to(x.dtype)
