"""Attention forward and backward at the token counts of I-JEPA's masks, dense and ragged.

    python -m pytest bench/bench_attention.py --benchmark-only

``dense``: contexts cut to the shortest of the batch; ``ragged``: all tokens, padded (sdpa) or
packed (varlen, xformers); ``target``: all patches. What cannot run here is skipped with its reason:
on a CPU that is everything but sdpa, and the batch is 8 instead of 128. Ragged rows have more
``tokens`` than dense ones and do more work; ``ns_per_token`` is what can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from njepa.config import MaskConfig
from njepa.data.batch import Lengths
from njepa.draws.masks import MaskSampler
from njepa.models.architecture import SIZES
from njepa.models.attention import Attention, Kernel, Sdpa, Sequences
from njepa.models.attention_kernels import FLASH_FIRST, load_kernel, probe

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH = 128 if CUDA else 8
TARGETS = 4
#: Encoder, and patches per side of the published recipes at 224 pixels.
MODELS = {"vit_small": 14, "vit_base": 14, "vit_large": 14, "vit_huge": 16}
PREDICTOR_WIDTH = 384
#: ``sdpa``: torch's own order of backends, on Hopper cuDNN first, which the trainer keeps for
#: static shapes. ``sdpa-flash``: the order that it takes for others.
IMPLS = ("sdpa", "sdpa-flash", "varlen", "xformers")


@cache
def kernel(impl: str, head_width: int) -> Kernel:
    """The kernel once it passed the trainer's own check; otherwise the test is skipped."""
    if impl == "sdpa-flash" and not CUDA:
        pytest.skip("sdpa-flash: needs CUDA")
    if impl.startswith("sdpa"):
        return Sdpa()
    try:
        found = load_kernel(impl, DEVICE, DTYPE)
        probe(found, DEVICE, DTYPE, head_width)
    except Exception as error:
        pytest.skip(f"{impl}: {str(error).splitlines()[0]}")
    return found


@pytest.fixture
def ordered(impl: str) -> Iterator[None]:
    with Attention(order=FLASH_FIRST if impl == "sdpa-flash" else ()).ordered():
        yield


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


def work(sequences: Sequences, qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of q, k, v, slices of one tensor [.., .., 3, H, h] as in a block; and output."""
    out = sequences.kernel(*qkv.requires_grad_().unbind(2), sequences)
    return torch.autograd.grad(out, qkv, grad)[0], out.detach()


def check(got: tuple[Tensor, Tensor], ours: Sequences, qkv: Tensor, grad: Tensor) -> None:
    """Against padded SDPA in fp64; four times the rounding of SDPA in the measured type."""
    keep = torch.ones(ours.rows, ours.length, dtype=torch.bool, device=DEVICE)
    if ours.index is not None:
        keep = (~keep).flatten().index_fill(0, ours.index, True).view_as(keep)
    elif ours.mask is not None:
        keep = ours.mask
    plain = Sequences(Sdpa(), ours.rows, ours.length, mask=keep)
    near = work(plain, qkv.clone(), grad)
    true = work(plain, qkv.double(), grad.double())
    for mine, near_x, true_x in zip(got, near, true, strict=True):
        mine = ours.leave(mine.flatten(2)).view_as(true_x)[keep]
        error, scale = (mine.double() - true_x[keep]).abs().max(), true_x[keep].abs().max()
        rounding = (near_x[keep].double() - true_x[keep]).abs().max()
        assert error <= 4 * (rounding + torch.finfo(DTYPE).eps * scale)


LAYOUTS = [("target", "dense"), ("context", "dense"), ("context", "ragged"),
           ("predictor", "dense"), ("predictor", "ragged")]  # fmt: skip


@pytest.mark.usefixtures("ordered")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("part", "layout"), LAYOUTS, ids=["-".join(p) for p in LAYOUTS])
@pytest.mark.parametrize(
    "model",
    [
        name if name == next(iter(MODELS)) else pytest.param(name, marks=pytest.mark.slow_on_cpu)
        for name in MODELS
    ],
)
def test_attention(benchmark: Any, model: str, part: str, layout: str, impl: str) -> None:
    sequences, shape, counts = case(model, part, layout, impl)
    rows, length, heads, head_width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, length, 3, heads, head_width, generator=generator).to(DEVICE, DTYPE)
    grad = torch.randn(shape, generator=generator).to(DEVICE, DTYPE)
    if sequences.mask is not None:
        grad = grad * sequences.mask[..., None, None]  # nothing comes back from padding
    entered = sequences.enter(qkv.flatten(2)).unflatten(2, qkv.shape[2:])
    grad_entered = sequences.enter(grad.flatten(2)).unflatten(2, shape[2:])

    def run() -> tuple[Tensor, Tensor]:
        result = work(sequences, entered.detach(), grad_entered)
        if CUDA:
            torch.cuda.synchronize()
        return result

    got = run()
    if sequences.index is not None:
        padded = torch.zeros_like(grad).flatten(0, 1)
        grad = padded.index_copy(0, sequences.index, grad_entered[0]).view_as(grad)
    check(got, sequences, qkv, grad)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(run, rounds=50 if CUDA else 5, warmup_rounds=5 if CUDA else 1)
    tokens, size = int(counts.sum()), qkv.element_size()
    median = benchmark.stats.stats.median if benchmark.stats else None
    benchmark.extra_info.update(
        op="attention",
        size=f"{model}-{part}-{layout}-r{rows}-l{length}-h{heads}x{head_width}",
        dtype=str(DTYPE).removeprefix("torch."),
        impl=impl,
        mode="fwdbwd",
        bytes=(4 + 8) * tokens * heads * head_width * size,
        peak_bytes=torch.cuda.max_memory_allocated() if CUDA else None,
        flops=14 * int((counts**2).sum()) * heads * head_width,
        tokens=tokens,
        ns_per_token=None if median is None else 1e9 * median / tokens,
    )
