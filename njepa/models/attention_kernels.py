"""The attention kernels beside SDPA, and the choice among them by running them.

An import proves little (a wheel for another CUDA version imports well), so a kernel is taken only
once it gave SDPA's values and gradients on the device, in the type and at the head width of the
training.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from njepa.config import ConfigError, MaskConfig, ModelConfig
from njepa.data.batch import Lengths
from njepa.models.attention import Attention, Kernel, Sdpa, Sequences

#: For shapes that change: cuDNN builds a plan for each, which takes longer than many a step.
FLASH_FIRST = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


@dataclass(frozen=True)
class Varlen:
    """``torch.nn.attention.varlen.varlen_attn``: packed, CUDA, fp16 and bf16.

    Only its seven positional arguments are used; they are those of torch 2.11 to 2.15, while the
    keywords changed.
    """

    function: Callable[..., Tensor]
    name = "varlen"
    packs = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        keys = sequences.keys or sequences
        out = self.function(
            *(x.flatten(0, 1) for x in (q, k, v)),
            _cu_seqlens(sequences, q.device),
            _cu_seqlens(keys, q.device),
            max(sequences.counts or [sequences.length]),
            max(keys.counts or [keys.length]),
        )
        return out.view_as(q)


def _cu_seqlens(sequences: Sequences, device: torch.device) -> Tensor:
    if sequences.cu_seqlens is not None:
        return sequences.cu_seqlens
    if "cu_seqlens" not in sequences.memo:
        ends = torch.arange(sequences.rows + 1, dtype=torch.int32, device=device)
        sequences.memo["cu_seqlens"] = ends * sequences.length
    cached: Tensor = sequences.memo["cu_seqlens"]
    return cached


@dataclass(frozen=True)
class Xformers:
    """``memory_efficient_attention`` of xformers, with ``BlockDiagonalMask`` where packed."""

    function: Callable[..., Tensor]
    from_seqlens: Callable[..., Any]
    name = "xformers"
    packs = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        keys = sequences.keys or sequences
        if sequences.counts is None and keys.counts is None:
            return self.function(q, k, v)
        if "bias" not in sequences.memo:
            lengths = [s.counts or [s.length] * s.rows for s in (sequences, keys)]
            sequences.memo["bias"] = self.from_seqlens(*map(list, lengths), device=q.device)
        packed = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
        return self.function(*packed, attn_bias=sequences.memo["bias"]).view_as(q)


def load_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel of that name.

    Raises:
        RuntimeError: it cannot run there, or is not installed; says why.
    """
    if name == "sdpa":
        return Sdpa(products=_products_win(device, dtype))
    if name == "varlen":
        if device.type != "cuda":
            raise RuntimeError("needs CUDA")
        if dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"needs bf16, the training computes in {_short(dtype)}")
        return Varlen(importlib.import_module("torch.nn.attention.varlen").varlen_attn)
    broken: list[str] = []
    for module in _XFORMERS:
        try:
            fmha = importlib.import_module(module)
        except Exception as error:  # a wheel for another CUDA may raise anything
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or not f"{module}.".startswith(f"{missing}."):
                broken.append(f"the import of {module} failed: {_first_line(error)}")
            continue
        return Xformers(fmha.memory_efficient_attention, fmha.BlockDiagonalMask.from_seqlens)
    raise RuntimeError("; ".join(broken) or "not installed")


def _products_win(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16


#: Where the kernel of xformers may be: the first is its new home.
_XFORMERS = ("mslk.attention.fmha", "xformers.ops.fmha")


#: Tokens of the probe's sequences: short ones, and one above 128, where kernels switch.
_PROBES = ((3, 40, 17), (200, 1, 130))


def probe(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_width: int) -> None:
    """Run forward and backward, ragged and dense, and compare with SDPA sequence by sequence.

    Raises:
        RuntimeError: an output or a gradient is further from fp64 than four times SDPA's in
            ``dtype`` plus four roundings: room for another order of the sums, while a token too
            many or a lost factor is far outside. What the kernel itself raises passes through.
    """
    attention = Attention(kernel, kernel)
    for counts in (*_PROBES, (40, 40)):
        length = max(counts)
        generator = torch.Generator().manual_seed(length)
        inputs = torch.randn(4, len(counts), length, 2, head_width, generator=generator)
        inputs = inputs.to(device, dtype)
        lengths = Lengths(counts, torch.tensor(counts, device=device))
        ours = _as_in_a_block(attention.sequences(len(counts), length, lengths), inputs)
        with Attention(order=FLASH_FIRST).ordered():  # cuDNN would plan each of these shapes
            plain, exact = (_each_alone(counts, x) for x in (inputs, inputs.double()))
        names = "gradient", "output"
        for name, got, near, true in zip(names, ours, plain, exact, strict=True):
            error, scale = (got.double() - true).abs().max(), true.abs().max()
            allowed = 4 * ((near.double() - true).abs().max() + torch.finfo(dtype).eps * scale)
            if not bool(error <= allowed):  # also where it is not a number
                raise RuntimeError(
                    f"{name} differs from SDPA by {error.item():.2g}, at most {allowed.item():.2g} "
                    f"is allowed"
                )


def _as_in_a_block(sequences: Sequences, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [3, R, L, H, h] and output [R, L, H, h] for q, k, v and the output's gradient.

    q, k and v are slices of one tensor, as ``SelfAttention`` has them: their strides matter.
    """
    heads = inputs.shape[-2:]
    qkv = inputs[:3].movedim(0, 2).contiguous().requires_grad_()
    q, k, v = sequences.enter(qkv.flatten(2)).unflatten(2, (3, *heads)).unbind(2)
    out = sequences.kernel(q, k, v, sequences).flatten(2)
    out = sequences.leave(out).unflatten(2, heads)
    (gradient,) = torch.autograd.grad(out, qkv, inputs[3])
    return gradient.movedim(2, 0), out.detach()


def _each_alone(counts: Sequence[int], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The same by SDPA, one sequence at a time."""
    gradient, output = torch.zeros_like(inputs[:3]), torch.zeros_like(inputs[3])
    for row, n in enumerate(counts):
        qkv = inputs[:3, row, :n].transpose(1, 2).unsqueeze(1).clone().requires_grad_()
        out = F.scaled_dot_product_attention(*qkv)
        grad = inputs[3, row, :n].transpose(0, 1).unsqueeze(0)
        (own,) = torch.autograd.grad(out, qkv, grad)
        gradient[:, row, :n] = own.squeeze(1).transpose(1, 2)
        output[row, :n] = out.detach().squeeze(0).transpose(0, 1)
    return gradient, output


def choose_attention(
    model: ModelConfig,
    mask: MaskConfig,
    head_widths: set[int],
    device: torch.device,
    dtype: torch.dtype,
) -> Attention:
    """What ``model.attention`` asks for, or for ``auto`` the first that works.

    ``auto``: SDPA for dense masks; for ragged ones ``varlen``, ``xformers``, then SDPA with a mask.

    On compute capability 9.0 and 10.0 torch 2.11 to 2.15 try cuDNN first. It is the faster one
    there, but builds a plan for every new shape, once in the thread of the forward and once in that
    of the backward. So torch's order stays with ``mask.static_shapes`` only.
    (TORCH_CUDNN_SDPA_AVOID_RECOMPILE, which rounds lengths up, takes contiguous q, k and v; ours
    are slices of one product.)

    Args:
        head_widths: of encoder and predictor. dtype: of the training's activations.

    Raises:
        ConfigError: the kernel that is asked for cannot run here; says why.
    """

    order: tuple[SDPBackend, ...] = ()
    notes: list[str] = []

    def attempt(name: str) -> Kernel | str:
        # Whatever a foreign kernel raises is the reason not to use it.
        try:
            kernel = load_kernel(name, device, dtype)
        except Exception as error:
            return _first_line(error)
        for width in sorted(head_widths):
            try:
                with Attention(order=order).ordered():
                    probe(kernel, device, dtype, width)
            except Exception as error:
                if isinstance(error, NotImplementedError) and "No operator found" in str(error):
                    kind = device.type.upper()  # xformers then lists one reason per operator
                    return f"no {kind} operator for {_short(dtype)} and heads of width {width}"
                return f"the probe failed: {_first_line(error)}"
        return kernel

    if device.type == "cuda" and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0)):
        if not mask.static_shapes:
            order, notes = FLASH_FIRST, ["flash before cuDNN, which plans each new shape"]
        elif isinstance(tried := attempt("sdpa"), str):
            order, notes = FLASH_FIRST, [f"flash before cuDNN: {tried}"]
        else:
            notes = ["cuDNN before flash: static shapes"]
    if _products_win(device, dtype):
        notes = ["two products where a gradient is needed"]
    if model.attention != "auto":
        kernel = attempt(model.attention)
        if isinstance(kernel, str):
            raise ConfigError(
                f"model.attention={model.attention} cannot run on {device.type} in "
                f"{_short(dtype)}: {kernel}; set model.attention=auto or sdpa"
            )
        reason = ["as configured", *(notes if isinstance(kernel, Sdpa) else ())]
        return Attention(kernel, kernel, "; ".join(reason), order)
    dense = Sdpa(products=_products_win(device, dtype))
    if not mask.ragged:
        installed = any(importlib.util.find_spec(module.split(".")[0]) for module in _XFORMERS)
        unused = f"xformers: {'for ragged masks only' if installed else 'not installed'}"
        return Attention(dense, dense, "; ".join(["dense masks", *notes, unused]), order)
    failed: list[str] = []
    for name in ("varlen", "xformers"):
        kernel = attempt(name)
        if not isinstance(kernel, str):
            reason = [f"{dense.name} where all lengths are equal", *notes, *failed]
            if name == "varlen":
                reason.append("xformers: not tried, varlen works")
            return Attention(dense, kernel, "; ".join(reason), order)
        failed.append(f"{name}: {kernel}")
    return Attention(dense, dense, "; ".join([*failed, "ragged masks are padded", *notes]), order)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":") if lines else type(error).__name__


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
        dtype, str(dtype)
    )
