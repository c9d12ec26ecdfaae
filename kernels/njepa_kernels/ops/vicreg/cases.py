"""Cases of vicreg. M views, n samples, D width."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..._runtime.rows import compute_dtype
from ...testing import Inputs, OpCase, vit_sizes
from .op import vicreg
from .reference import VicregTerms, vicreg_reference


def vicreg_eager(
    u: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    group: dist.ProcessGroup | None = None,
) -> VicregTerms:
    """As facebookresearch/vicreg does it, for every pair of views; one process."""
    views = (u if u.dim() == 3 else torch.stack((u, u))).to(compute_dtype(u)).unbind(0)
    n, width = views[0].shape

    def std(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(gamma - torch.sqrt(x.var(dim=0) + eps)).mean()

    def cov(x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(dim=0)
        c = (x.T @ x) / (n - 1)
        return (c.square().sum() - c.diagonal().square().sum()) / width

    pairs = [(i, j) for i in range(len(views)) for j in range(i)] or [(0, 0)]
    terms = [
        (
            (views[i] - views[j]).square().mean(),
            (std(views[i]) + std(views[j])) / 2,
            cov(views[i]) + cov(views[j]),
        )
        for i, j in pairs
    ]
    inv, std_term, cov_term = (torch.stack(term).mean() for term in zip(*terms, strict=True))
    return VicregTerms(inv, std_term, cov_term)


def _case(
    size: str,
    m: int | None,
    n: int,
    d: int,
    *,
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        shape = (n, d) if m is None else (m, n, d)
        # Channels of different spread, so that the hinge acts on some and not on others.
        spread = torch.linspace(0.2, 2.0, d)
        return {"u": (torch.randn(shape, generator=g) * spread + 0.5).to(device, dtype)}

    views = m or 1
    product = views * n * d * min(n, d)  # half of 2 n d min(n, d), by symmetry

    return OpCase(
        op="vicreg",
        size=size,
        function=vicreg,
        reference=vicreg_reference,
        eager=vicreg_eager,
        make_inputs=make_inputs,
        # No gradient before all of u was seen: read, read again, written.
        bytes=lambda dtype, mode: views * n * d * dtype.itemsize * (3 if mode == "fwdbwd" else 1),
        flops=lambda mode: product * (3 if mode == "fwdbwd" else 1),
        differentiable=("u",),
        small=small,
        devices=devices,
    )


CASES = [
    _case("m4-n16-d8", 4, 16, 8),
    _case("m4-n8-d40", 4, 8, 40),
    _case("m2-n33-d33", 2, 33, 33),
    _case("m1-n17-d100", 1, 17, 100),
    _case("n65-d30", None, 65, 30),
    _case("n5-d19", None, 5, 19),
    _case("m4-n128-d384", 4, 128, 384, small=False),
    _case("n256-d2048", None, 256, 2048, small=False),
    # The four blocks of a step: n images, the width of the predictions.
    *(_case(size, 4, b, vit.width, small=False, devices=on) for size, vit, b, on in vit_sizes()),
    _case("m4-n2048-d1024", 4, 2048, 1024, small=False, devices=("cuda",)),
    _case("n2048-d8192", None, 2048, 8192, small=False, devices=("cuda",)),
]
