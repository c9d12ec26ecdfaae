"""Cases of bias_gelu. B images, N tokens, H width inside of the MLP."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ...testing import Inputs, Mode, OpCase, vit_sizes
from .op import bias_gelu
from .reference import Approximate, bias_gelu_reference


def bias_gelu_eager(
    x: torch.Tensor, bias: torch.Tensor, approximate: Approximate = "none"
) -> torch.Tensor:
    """The bias in the type of the product, as autocast casts it, then ``F.gelu``."""
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


def _case(
    size: str,
    b: int,
    n: int,
    h: int,
    *,
    approximate: Approximate = "none",
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        return {
            "x": (1.5 * torch.randn(b, n, h, generator=g)).to(device, dtype),
            "bias": (0.5 * torch.randn(h, generator=g)).to(device),
            "approximate": approximate,
        }

    elements = b * n * h

    def traffic(dtype: torch.dtype, mode: Mode) -> int:
        # In and out; then both read again with the gradient in the place of out. The bias.
        passes, biases = (5, 3) if mode == "fwdbwd" else (2, 1)
        return elements * passes * dtype.itemsize + biases * h * 4

    return OpCase(
        op="bias_gelu",
        size=size,
        function=bias_gelu,
        reference=bias_gelu_reference,
        eager=bias_gelu_eager,
        make_inputs=make_inputs,
        bytes=traffic,
        flops=lambda mode: elements * (28 + (34 if mode == "fwdbwd" else 0)),
        differentiable=("x", "bias"),
        small=small,
        devices=devices,
    )


CASES = [
    _case("b2-n9-h128", 2, 9, 128),
    _case("b3-n23-h100", 3, 23, 100),
    _case("b2-n9-h128-tanh", 2, 9, 128, approximate="tanh"),
    _case("b2-n35-h33-tanh", 2, 35, 33, approximate="tanh"),
    _case("b1-n1-h1", 1, 1, 1),
    _case("b0-n5-h48", 0, 5, 48),
    *(
        _case(size, b, vit.patches, 4 * vit.width, small=False, devices=on)
        for size, vit, b, on in vit_sizes()
    ),
]
