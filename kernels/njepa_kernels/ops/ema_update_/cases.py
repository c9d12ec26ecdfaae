"""Cases of ema_update_: lists of tensors as a ViT has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...testing import VITS, Inputs, OpCase, VitSize
from .op import ema_update_
from .reference import ema_update_reference_


@torch.no_grad()
def ema_update_eager_(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    momentum: float | torch.Tensor,
    shadow: Sequence[torch.Tensor] | None = None,
) -> None:
    """As facebookresearch/ijepa does it, tensor after tensor."""
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        target.mul_(momentum).add_((1.0 - momentum) * source)
        if shadow is not None:
            shadow[i].copy_(target)


def _written(result: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    lists = {"target": inputs["targets"], "shadow": inputs["shadow"] or []}
    return {f"{name} {i}": t for name, tensors in lists.items() for i, t in enumerate(tensors)}


def vit_shapes(vit: VitSize) -> list[tuple[int, ...]]:
    """Shapes of the encoder's parameters in timm's order; the table of positions is fixed."""
    width = vit.width
    block: list[tuple[int, ...]] = [
        (width,),
        (width,),
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    patches: tuple[int, ...] = (width, 3, vit.patch, vit.patch)
    return [patches, (width,), *(block * vit.depth), (width,), (width,)]


def _case(
    size: str,
    shapes: Sequence[tuple[int, ...]],
    *,
    shadow: bool = True,
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        targets = [torch.randn(shape, generator=g).to(device) for shape in shapes]
        return {
            "targets": targets,
            "sources": [torch.randn(s, generator=g).to(device, dtype) for s in shapes],
            "momentum": 0.996,
            "shadow": [t.to(torch.bfloat16) for t in targets] if shadow else None,
        }

    count = sum(torch.Size(shape).numel() for shape in shapes)
    return OpCase(
        op="ema_update_",
        size=size,
        function=ema_update_,
        reference=ema_update_reference_,
        eager=ema_update_eager_,
        make_inputs=make_inputs,
        bytes=lambda dtype, mode: count * (8 + dtype.itemsize + (2 if shadow else 0)),
        flops=lambda mode: 3 * count,
        small=small,
        devices=devices,
        outputs=_written,
    )


CASES = [
    _case("five-shadow", [(3,), (17, 5), (0, 4), (), (2, 3, 4)]),
    _case("five", [(3,), (17, 5), (0, 4), (), (2, 3, 4)], shadow=False),
    _case("none", []),
    # L/16 and H/14 take 4 and 9 GB with their fp64 check beside them: on a GPU only.
    *(
        _case(
            name,
            vit_shapes(vit),
            small=False,
            devices=("cpu", "cuda") if vit.width < 1024 else ("cuda",),
        )
        for name, vit in VITS.items()
    ),
]
