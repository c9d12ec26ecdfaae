"""Cases of gather_tokens. B batch, N patches, K kept tokens, M masks, D width."""

from __future__ import annotations

import torch

from ...testing import Inputs, Mode, OpCase, distinct_rows, draw_indices, vit_sizes
from .op import gather_tokens
from .reference import gather_tokens_reference


def gather_tokens_eager(
    x: torch.Tensor, idx: torch.Tensor, pos: torch.Tensor | None = None
) -> torch.Tensor:
    """As facebookresearch/ijepa does it: add the positions to all tokens, then gather."""
    dtype = x.dtype
    if pos is not None:
        x = x + pos
    masks = [idx] if idx.dim() == 2 else list(idx.unbind(1))
    kept = [x.gather(1, mask.unsqueeze(-1).repeat(1, 1, x.shape[2])) for mask in masks]
    return (kept[0] if idx.dim() == 2 else torch.stack(kept, dim=1)).to(dtype)


def _case(
    size: str,
    b: int,
    n: int,
    k: int,
    d: int,
    m: int | None = None,
    *,
    pos: bool = True,
    duplicates: bool = False,
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        rows = b * (m or 1)
        if duplicates:
            idx = torch.randint(0, n, (rows, k), generator=g)
        else:
            idx = draw_indices(rows, n, k, g)
        return {
            "x": torch.randn(b, n, d, generator=g).to(device, dtype),
            "idx": idx.view((b, k) if m is None else (b, m, k)).to(device),
            "pos": torch.randn(n, d, generator=g).to(device) if pos else None,
        }

    kept = b * (m or 1) * k

    def traffic(dtype: torch.dtype, mode: Mode) -> int:
        # A row that several masks name is read once; positions are fp32, and so is their gradient.
        row, table = d * dtype.itemsize, n * d * 4 if pos else 0
        forward = kept * (row + 8) + b * distinct_rows(n, k, m or 1) * row + table
        backward = kept * (row + 8) + b * n * row + table
        return forward + (backward if mode == "fwdbwd" else 0)

    return OpCase(
        op="gather_tokens",
        size=size,
        function=gather_tokens,
        reference=gather_tokens_reference,
        eager=gather_tokens_eager,
        make_inputs=make_inputs,
        bytes=traffic,
        flops=lambda mode: kept * d if pos else 0,
        differentiable=("x", "pos"),
        small=small,
        devices=devices,
    )


CASES = [
    _case("b3-n49-k12-d64", 3, 49, 12, 64),
    _case("b2-n197-k1-d100", 2, 197, 1, 100),
    _case("b2-n49-m4-k9-d64", 2, 49, 9, 64, 4),
    _case("b2-n49-m1-k9-d33-nopos", 2, 49, 9, 33, 1, pos=False),
    _case("b2-n9-m3-k20-d32-duplicates", 2, 9, 20, 32, 3, duplicates=True),
    _case("b0-n49-k12-d64", 0, 49, 12, 64),
    *(
        _case(size, b, vit.patches, vit.context, vit.width, small=False, devices=on)
        for size, vit, b, on in vit_sizes()
    ),
    _case("vitl16-224-b128-m4", 128, 196, 33, 1024, 4, pos=False, small=False, devices=("cuda",)),
]
