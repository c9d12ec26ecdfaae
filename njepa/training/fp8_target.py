"""``model.target_dtype=fp8``: products of the target encoder's blocks with 8-bit factors.

Each row of the tokens and each row of a weight has a scale of its own:

    y = (round(x / s_x) round(W / s_w)^T) s_x s_w + b,   s = max |row| / 448

Rounding is to float8_e4m3fn (4 significant bits, largest value 448), sums are in fp32, y is bf16.
Only qkv, proj, fc1 and fc2 multiply so; nothing else of the encoder changes.
"""

from __future__ import annotations

import torch
from njepa_kernels import Impl, bias_gelu
from torch import Tensor, nn

from njepa.choice import Choice
from njepa.config import ConfigError
from njepa.models.architecture import Stack
from njepa.models.block import Block, GeluLinear

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_LEAST = 1e-12  # of max |row|: a row of zeros stays one

#: Of a block: where its products are.
_PRODUCTS = (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"))


def choose_target_dtype(wanted: str, low: bool, device: torch.device, encoder: Stack) -> Choice:
    """Resolve ``model.target_dtype`` to ``fp32``, ``bf16`` or ``fp8``.

    Args:
        low: the run computes in bf16.

    Raises:
        ConfigError: the run computes in fp32; with ``fp8`` also a GPU or widths without products
            in fp8.
    """
    if wanted == "auto":
        return Choice("bf16" if low else "fp32", "as the other layers")
    if not low:
        raise ConfigError(
            f"model.target_dtype={wanted} needs a run that computes in bf16, and this one computes "
            f"in fp32 on {device.type}; set torch_autocast.enabled=true in the DeepSpeed file, or "
            f"model.target_dtype=auto"
        )
    if wanted == "bf16":
        return Choice("bf16", "as configured")
    refused = _no_shape(encoder) or (_no_gpu(device) if device.type == "cuda" else None)
    if refused is not None:
        raise ConfigError(f"model.target_dtype=fp8 {refused}, or set model.target_dtype=auto")
    return Choice("fp8", "as configured" if device.type == "cuda" else "slower than bf16 on a CPU")


def _no_shape(encoder: Stack) -> str | None:
    """What torch asks of both sides of a weight on a GPU; here on every device."""
    if encoder.width % 16 == 0 and encoder.hidden % 16 == 0:
        return None
    return (
        f"needs an encoder whose width and MLP width are multiples of 16, got {encoder.width} and "
        f"{encoder.hidden}; change model.width"
    )


def _no_gpu(device: torch.device) -> str | None:
    """Why ``torch._scaled_mm`` with a scale a row does not run on this GPU.

    Source: aten/src/ATen/native/cuda/ScaledBlas.cpp of pytorch. On 8.9 torch 2.11 may hang outside
    of the default stream, as in a CUDA graph's warm-up (pytorch#177651, mended in 2.12).
    """
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"runs on NVIDIA's GPUs, got {name}; take another device"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return (
            f"needs compute capability 8.9 or more (Ada, Hopper, Blackwell), got {major}.{minor} "
            f"({name}); take another device"
        )
    version = torch.__version__
    if (major, minor) == (8, 9) and tuple(map(int, version.split(".")[:2])) < (2, 12):
        return f"needs torch 2.12 or later on compute capability 8.9 ({name}), got {version}"
    return None


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [..., K] over the scale of its row, in fp8, and the scales [..., 1], in fp32.

    A row with a value that is not finite becomes NaN in every product.
    """
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = torch.maximum(-low, high).float().clamp(min=_LEAST) / _LARGEST
    return (x / scale).to(FP8), scale


class Fp8Weights:
    """The weights of one product of all blocks, in bf16 and in fp8.

    Attributes:
        source: bf16 [L, N, K], which updates of the target write.
        weight: fp8 [L, N, K]. scale: fp32 [L, 1, N].
    """

    def __init__(self, source: Tensor) -> None:
        self.source, self.weight = source, torch.empty_like(source, dtype=FP8)
        self.scale = source.new_empty(len(source), 1, source.shape[1], dtype=torch.float32)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow ``source``, in place: a captured graph reads what it read."""
        weight, scale = to_fp8(self.source)
        self.weight.copy_(weight)
        self.scale.copy_(scale.mT)


class Fp8Linear(nn.Module):
    """A frozen linear layer whose product is in fp8: tokens [..., K] in, bf16 [..., N] out."""

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear, weights: Fp8Weights, number: int) -> None:
        """``weights``: in whose place ``number`` those of ``layer`` are."""
        super().__init__()
        self.bias = layer.bias
        self.register_buffer("weight", weights.weight[number], persistent=False)
        self.register_buffer("scale", weights.scale[number], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, scale = to_fp8(x.flatten(0, -2))
        # Its public successor, nn.functional.scaled_mm, has no CPU kernel in torch 2.11. Fast
        # accumulation, which rounds the sums on Hopper, is off: it cannot be measured on a CPU.
        y = torch._scaled_mm(
            rows, self.weight.t(), scale, self.scale, bias=bias, out_dtype=torch.bfloat16
        )
        out: Tensor = y.unflatten(0, x.shape[:-1])
        return out


class Fp8GeluLinear(Fp8Linear):
    """``GeluLinear`` likewise; bias and GELU are its own op."""

    def __init__(self, layer: GeluLinear, weights: Fp8Weights, number: int) -> None:
        super().__init__(layer, weights, number)
        self.impl: Impl = layer.impl

    def forward(self, x: Tensor) -> Tensor:
        return bias_gelu(self._product(x, None), self.bias, impl=self.impl)


def products(blocks: nn.ModuleList) -> list[list[nn.Linear]]:
    """The linear layers of the blocks, by kind; all of a kind have one shape."""
    return [
        [block.get_submodule(f"{part}.{name}") for block in blocks]  # type: ignore[misc]
        for part, name in _PRODUCTS
    ]


def use_fp8(blocks: nn.ModuleList, weights: list[Fp8Weights]) -> None:
    """Put products in fp8 in the places of ``products(blocks)``."""
    for (part, name), kind in zip(_PRODUCTS, weights, strict=True):
        for number, block in enumerate(blocks):
            assert isinstance(block, Block)
            owner = block.get_submodule(part)
            layer = owner.get_submodule(name)
            made = Fp8GeluLinear if isinstance(layer, GeluLinear) else Fp8Linear
            setattr(owner, name, made(layer, kind, number))  # type: ignore[arg-type]
