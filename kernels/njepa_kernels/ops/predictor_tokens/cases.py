"""Cases of predictor_tokens. B batch, M blocks, Kc context, Kt targets, N patches, d width."""

from __future__ import annotations

from typing import Literal

import torch

from ..._runtime.philox import NoiseKey, philox_normal
from ...testing import Inputs, Mode, OpCase, draw_indices, vit_sizes
from .op import predictor_tokens
from .reference import predictor_tokens_reference

_Draw = Literal["per_block", "shared"]


def predictor_tokens_eager(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    sigma: torch.Tensor | None = None,
    noise: NoiseKey | None = None,
) -> torch.Tensor:
    """As facebookresearch/ijepa does it, with noise on the gathered positions."""
    batch, n_blocks, n_targets = target_idx.shape
    width = pos.shape[1]
    table = pos.unsqueeze(0).repeat(batch, 1, 1)
    x = context + table.gather(1, context_idx.unsqueeze(-1).repeat(1, 1, width))
    x = x.repeat(n_blocks, 1, 1)
    blocks = target_idx.unbind(1)
    psi = torch.cat([table.gather(1, j.unsqueeze(-1).repeat(1, 1, width)) for j in blocks])
    if sigma is not None:
        assert noise is not None
        n = philox_normal(noise, target_idx, width)
        n = n.transpose(0, 1).reshape(n_blocks * batch, n_targets, width)
        s = sigma.unsqueeze(-1).repeat(1, 1, n_targets)
        psi = psi + s.transpose(0, 1).reshape(n_blocks * batch, n_targets, 1) * n
    queries = mask_token.view(1, 1, width).repeat(n_blocks * batch, n_targets, 1) + psi
    return torch.cat((x, queries), dim=1).to(context.dtype)


def _case(
    size: str,
    b: int,
    m: int,
    kc: int,
    kt: int,
    n: int,
    d: int,
    *,
    noise: _Draw | None = "per_block",
    step_tensor: bool = False,
    small: bool = True,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    def make_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        step = torch.tensor(seed).to(device) if step_tensor else seed
        return {
            "context": torch.randn(b, kc, d, generator=g).to(device, dtype),
            "pos": torch.randn(n, d, generator=g).to(device),
            "mask_token": torch.randn(d, generator=g).to(device, dtype),
            "context_idx": draw_indices(b, n, kc, g).to(device),
            "target_idx": draw_indices(b * m, n, kt, g).view(b, m, kt).to(device),
            "sigma": None if noise is None else (torch.rand(b, m, generator=g) * 2.0).to(device),
            "noise": NoiseKey(
                7,
                step,
                torch.randint(0, 2**31, (b,), generator=g).to(device),
                shared=noise == "shared",
            ),
        }

    def traffic(dtype: torch.dtype, mode: Mode) -> int:
        out = m * b * (kc + kt) * d * dtype.itemsize
        inputs = b * kc * d * dtype.itemsize + n * d * 4 + b * (kc + m * kt) * 8
        return (out + inputs) * (2 if mode == "fwdbwd" else 1)

    def flops(mode: Mode) -> int:
        forward = b * kc * d + m * b * kt * d * (1 if noise is None else 3)
        return forward + (m * b * (kc + kt) * d if mode == "fwdbwd" else 0)

    return OpCase(
        op="predictor_tokens",
        size=size,
        function=predictor_tokens,
        reference=predictor_tokens_reference,
        eager=predictor_tokens_eager,
        make_inputs=make_inputs,
        bytes=traffic,
        flops=flops,
        differentiable=("context", "pos", "mask_token", "sigma"),
        small=small,
        devices=devices,
    )


_LARGE: tuple[tuple[str, _Draw | None], ...] = (("", None), ("-noise", "per_block"))

CASES = [
    _case("b3-m4-kc10-kt6-n36-d48-clean", 3, 4, 10, 6, 36, 48, noise=None),
    _case("b3-m4-kc10-kt6-n36-d48-noise", 3, 4, 10, 6, 36, 48),
    _case("b2-m3-kc10-kt6-n36-d48-shared", 2, 3, 10, 6, 36, 48, noise="shared"),
    _case("b3-m4-kc10-kt6-n36-d48-step", 3, 4, 10, 6, 36, 48, step_tensor=True),
    _case("b2-m1-kc1-kt1-n197-d100", 2, 1, 1, 1, 197, 100),
    _case("b2-m3-kc5-kt4-n16-d30-shared", 2, 3, 5, 4, 16, 30, noise="shared"),
    _case("b2-m3-kc0-kt4-n16-d48", 2, 3, 0, 4, 16, 48),
    _case("b0-m4-kc10-kt6-n36-d48", 0, 4, 10, 6, 36, 48),
    *(
        _case(
            size + suffix,
            b,
            4,
            vit.context,
            vit.targets,
            vit.patches,
            vit.predictor_width,
            noise=noise,
            small=False,
            devices=on,
        )
        for size, vit, b, on in vit_sizes()
        for suffix, noise in _LARGE
    ),
]
