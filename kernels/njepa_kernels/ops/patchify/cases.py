"""Cases of patchify. B images of h x w patches of p x p pixels, K kept patches."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ...testing import Inputs, Mode, OpCase, draw_indices
from .op import patchify
from .reference import patchify_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as everybody uses them


@functools.cache
def _channels(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """A number for each channel; made once, because the copy from the host waits for the GPU."""
    return torch.tensor(values, device=device).view(3, 1, 1)


# A constant of the compiled composition too; see _runtime/dispatch.py.
_channels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def patchify_eager(
    images: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    idx: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """As torchvision does it (ToTensor, Normalize), then the unfolding of the patch convolution."""
    x = images.permute(0, 3, 1, 2).contiguous().float().div(255)
    x = x.sub(_channels(tuple(mean), x.device)).div(_channels(tuple(std), x.device)).to(out_dtype)
    patches = F.unfold(x, patch_size, stride=patch_size).transpose(1, 2)
    if idx is not None:
        patches = patches.gather(1, idx.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    return patches.contiguous()


def _case(
    size: str,
    b: int,
    grid: tuple[int, int],
    p: int,
    k: int | None = None,
    *,
    planes: bool = False,
    duplicates: bool = False,
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    n = grid[0] * grid[1]

    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        shape = (b, grid[0] * p, grid[1] * p, 3)
        pixels = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        if planes:
            pixels = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        idx = None
        if k is not None and duplicates:
            idx = torch.randint(0, n, (b, k), generator=g)
        elif k is not None:
            idx = draw_indices(b, n, k, g)
        return {
            "images": pixels.to(device),
            "patch_size": p,
            "mean": MEAN,
            "std": STD,
            "idx": None if idx is None else idx.to(device),
            "out_dtype": dtype,
        }

    kept = b * (n if k is None else k)

    def traffic(dtype: torch.dtype, mode: Mode) -> int:
        return kept * (3 * p * p * (1 + dtype.itemsize) + (0 if k is None else 8))

    return OpCase(
        op="patchify",
        size=size,
        function=patchify,
        reference=patchify_reference,
        eager=patchify_eager,
        make_inputs=make_inputs,
        bytes=traffic,
        flops=lambda mode: kept * 3 * p * p * 2,
        small=small,
        devices=devices,
    )


CASES = [
    _case("b2-6x6-p8", 2, (6, 6), 8),
    _case("b3-3x5-p16-k7", 3, (3, 5), 16, 7),
    _case("b2-2x3-p14-planes", 2, (2, 3), 14, planes=True),
    _case("b2-4x3-p7-k20-duplicates", 2, (4, 3), 7, 20, duplicates=True),
    _case("b1-3x2-p1", 1, (3, 2), 1),
    _case("b2-2x2-p5-k3-planes", 2, (2, 2), 5, 3, planes=True),
    _case("b0-3x3-p8-k4", 0, (3, 3), 8, 4),
    _case("vits16-224-b8", 8, (14, 14), 16, small=False, devices=("cpu",)),
    _case("vith14-224-b8-k60", 8, (16, 16), 14, 60, small=False, devices=("cpu",)),
    _case("vitl16-224-b128", 128, (14, 14), 16, small=False, devices=("cuda",)),
    _case("vitl16-224-b128-k60", 128, (14, 14), 16, 60, small=False, devices=("cuda",)),
]
