"""Cases of add_layer_norm. B images, N tokens, D width."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from ..._runtime.rows import compute_dtype
from ...testing import Inputs, Mode, OpCase, vit_sizes
from .op import add_layer_norm
from .reference import AddLayerNorm, add_layer_norm_reference

#: The residual stream: in fp32 (as under autocast), in the type of the activations, or none.
Stream = Literal["fp32", "own", "none"]


def add_layer_norm_eager(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> AddLayerNorm:
    """As timm's block does it under autocast: add, LayerNorm in fp32, cast for the product."""
    total = x if residual is None else residual + x
    dtype = compute_dtype(total)
    out = F.layer_norm(total.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps)
    return AddLayerNorm(out.to(x.dtype if out_dtype is None else out_dtype), total)


def _case(
    size: str,
    b: int,
    n: int,
    d: int,
    *,
    stream: Stream = "fp32",
    eps: float = 1e-6,
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(b, n, d, generator=g).to(device, dtype)
        # Channels of unlike size, around a mean that is not zero: as the stream of a trained ViT.
        scale = torch.exp(torch.randn(d, generator=g))
        residual = torch.randn(b, n, d, generator=g) * scale + 0.5
        kept = torch.float32 if stream == "fp32" else dtype
        return {
            "x": x if stream != "none" else residual.to(device),
            "residual": residual.to(device, kept) if stream != "none" else None,
            "weight": (1 + 0.1 * torch.randn(d, generator=g)).to(device),
            "bias": (0.1 * torch.randn(d, generator=g)).to(device),
            "eps": eps,
            "out_dtype": dtype,
        }

    elements = b * n * d

    def traffic(dtype: torch.dtype, mode: Mode) -> int:
        low, wide = dtype.itemsize, (dtype if stream == "own" else torch.float32).itemsize
        moved = low + (wide if stream == "none" else low + 2 * wide)
        if mode == "fwdbwd":
            moved += low + 2 * wide  # the gradient of out and the row, read; that of the row
            if stream != "none":
                moved += wide + (low if low != wide else 0)  # that of the sum; that of x
        # Statistics, written and read; weight and bias, and their gradients.
        rest = b * n * 8 * (2 if mode == "fwdbwd" else 1) + d * (20 if mode == "fwdbwd" else 8)
        return elements * moved + rest

    return OpCase(
        op="add_layer_norm",
        size=size,
        function=add_layer_norm,
        reference=add_layer_norm_reference,
        eager=add_layer_norm_eager,
        make_inputs=make_inputs,
        bytes=traffic,
        flops=lambda mode: elements * (9 + (14 if mode == "fwdbwd" else 0)),
        differentiable=("x", "residual", "weight", "bias"),
        small=small,
        devices=devices,
    )


CASES = [
    _case("b2-n9-d64", 2, 9, 64),
    _case("b3-n23-d100-own", 3, 23, 100, stream="own", eps=1e-5),
    _case("b2-n70-d33-none", 2, 70, 33, stream="none"),
    _case("b1-n1-d1", 1, 1, 1),
    _case("b0-n5-d48", 0, 5, 48),
    *(
        _case(size, b, vit.patches, vit.width, small=False, devices=on)
        for size, vit, b, on in vit_sizes()
    ),
]
