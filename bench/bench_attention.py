"""Attention forward and backward at the token counts of I-JEPA's masks, dense and ragged.

    python -m pytest bench/bench_attention.py --benchmark-only

``dense``: contexts cut to the shortest of the batch; ``ragged``: all tokens, padded (sdpa) or
packed (varlen, xformers); ``target``: all patches. What cannot run here is skipped with its reason:
on a CPU that is everything but sdpa, and the batch is 8 instead of 128. Ragged rows have more
``tokens`` than dense ones and do more work; ``ns_per_token`` is what can be compared.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from njepa.config import MaskConfig
from njepa.data.batch import Lengths
from njepa.masking import MaskSampler
from njepa.models.attention import Attention, Kernel, Sdpa, Sequences
from njepa.models.attention_kernels import load_kernel, probe
from njepa.models.encoder import SIZES

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH = 128 if CUDA else 8
TARGETS = 4
#: Encoder, and patches per side of the published recipes at 224 pixels.
MODELS = {"vit_small": 14, "vit_base": 14, "vit_large": 14, "vit_huge": 16}
PREDICTOR_WIDTH = 384
#: ``sdpa``: torch's own order of backends. ``sdpa-cudnn``: what the trainer takes on Hopper.
IMPLS = ("sdpa", "sdpa-cudnn", "varlen", "xformers")


@cache
def kernel(impl: str, head_width: int) -> Kernel:
    """The kernel once it passed the trainer's own check; otherwise the test is skipped."""
    if impl == "sdpa":
        return Sdpa()
    try:
        found = load_kernel(impl.removesuffix("-cudnn"), DEVICE, DTYPE)
        probe(found, DEVICE, DTYPE, head_width)
    except Exception as error:
        pytest.skip(f"{impl}: {str(error).splitlines()[0]}")
    if found == Sdpa():
        pytest.skip("sdpa-cudnn: only on compute capability 9")
    return found


def case(
    model: str, part: str, layout: str, impl: str
) -> tuple[Sequences, tuple[int, ...], np.ndarray]:
    """How the sequences lie, the shape [R, L, H, h], and the tokens of each without padding."""
    heads, width, side = SIZES[model].heads, SIZES[model].width, MODELS[model]
    tail, rows = 0, BATCH
    masks = MaskSampler(MaskConfig(ragged=True), (side, side), seed=0)(0, np.arange(BATCH))
    longest, shortest = int(masks.lengths.max()), int(masks.lengths.min())
    if part == "predictor":
        width, tail, rows = PREDICTOR_WIDTH, masks.target_idx.shape[2], TARGETS * BATCH
    head_width = width // heads
    chosen = kernel(impl, head_width)
    attention = Attention(chosen, chosen)
    if layout == "ragged":
        lengths = Lengths(tuple(masks.lengths.tolist()), torch.from_numpy(masks.lengths).to(DEVICE))
        length, counts = longest + tail, np.tile(masks.lengths + tail, rows // BATCH)
        sequences = attention.sequences(rows, length, lengths, tail)
    else:
        length = side * side if part == "target" else shortest + tail
        counts, sequences = np.full(rows, length), attention.sequences(rows, length)
    return sequences, (rows, length, heads, head_width), counts


def work(sequences: Sequences, inputs: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients of q, k, v as they lie for the kernel, and the output."""
    leaves = [x.requires_grad_() for x in inputs.unbind()]
    out = sequences.kernel(*leaves, sequences)
    return [*torch.autograd.grad(out, leaves, grad), out.detach()]


def check(got: list[Tensor], ours: Sequences, padded: Tensor) -> None:
    """Against SDPA in fp32 with a mask; four times the rounding of SDPA in the measured type."""
    shape = padded.shape[1:]
    plain = Sequences(Sdpa(), shape[0], shape[1], mask=ours.mask)
    if ours.index is not None:
        mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device=DEVICE)
        plain.mask = mask.index_fill(0, ours.index, True).view(shape[:2])
    keep = torch.ones(shape[:2], device=DEVICE) if plain.mask is None else plain.mask
    grad = padded[3] * keep[..., None, None]
    near = work(plain, padded[:3].clone(), grad)
    true = work(plain, padded[:3].float(), grad.float())
    for ours_x, near_x, true_x in zip(got, near, true, strict=True):
        mine = ours.leave(ours_x.flatten(2)).unflatten(2, shape[2:]).float()
        weight = keep[..., None, None].float()
        error = ((mine - true_x) * weight).abs().max()
        rounding = ((near_x.float() - true_x) * weight).abs().max()
        scale = (true_x * weight).abs().max()
        assert error <= 4 * (rounding + torch.finfo(padded.dtype).eps * scale)


LAYOUTS = [("target", "dense"), ("context", "dense"), ("context", "ragged"),
           ("predictor", "dense"), ("predictor", "ragged")]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("part", "layout"), LAYOUTS, ids=["-".join(p) for p in LAYOUTS])
@pytest.mark.parametrize("model", MODELS)
def test_attention(benchmark: Any, model: str, part: str, layout: str, impl: str) -> None:
    sequences, shape, counts = case(model, part, layout, impl)
    generator = torch.Generator().manual_seed(0)
    padded = torch.randn(4, *shape, generator=generator).to(DEVICE, DTYPE)
    entered = torch.stack(
        [sequences.enter(x.flatten(2)).unflatten(2, shape[2:]) for x in padded.unbind()]
    )
    if sequences.mask is not None:
        entered[3] *= sequences.mask[..., None, None]
    inputs, grad = entered[:3].clone(), entered[3]

    def run() -> list[Tensor]:
        result = work(sequences, inputs, grad)
        if CUDA:
            torch.cuda.synchronize()
        return result

    check(run(), sequences, padded)
    benchmark.pedantic(run, rounds=50 if CUDA else 5, warmup_rounds=5 if CUDA else 1)
    rows, length, heads, head_width = shape
    tokens, size = int(counts.sum()), padded.element_size()
    median = benchmark.stats.stats.median if benchmark.stats else None
    benchmark.extra_info.update(
        op="attention",
        size=f"{model}-{part}-{layout}-r{rows}-l{length}-h{heads}x{head_width}",
        dtype=str(DTYPE).removeprefix("torch."),
        impl=impl,
        mode="fwdbwd",
        bytes=(4 + 8) * tokens * heads * head_width * size,
        flops=14 * int((counts**2).sum()) * heads * head_width,
        tokens=tokens,
        ns_per_token=None if median is None else 1e9 * median / tokens,
    )
