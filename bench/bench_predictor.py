"""The predictor with a context per block and with a shared one; the ways to compute the latter.

    python -m pytest bench/bench_predictor.py --benchmark-only --full

``test_predictor``: forward and backward by ``model.predictor.context``, eager and compiled, of M
blocks or (``noise.predictors=shared``) of the M blocks twice. ``test_attention``: the attention
that was chosen (``segments``) against other ways to the same result. fp32 on a CPU, bf16 on a GPU
(not measured on one yet). Token counts are means of the mask sampler at batch 128. ``bytes`` is a
lower bound: inputs and weights read twice, their gradients written, the output and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.published.networks import PublishedPredictor
from bench.published.shared_context import dense_prediction, may_attend
from njepa.data.batch import Masks
from njepa.models.architecture import Stack
from njepa.models.attention import SDPA
from njepa.models.predictor import Predictor
from njepa.models.shared_context import Segments, shared_context_attention

pytestmark = pytest.mark.slow_on_cpu
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOLERANCE = 3e-2 if CUDA else 1e-5
N_BLOCKS, WIDTH = 4, 384

Attend = Callable[[Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """The predictor of a recipe, and the batch on a CPU and on a GPU."""

    encoder_width: int
    depth: int
    heads: int
    side: int
    n_context: int
    n_targets: int
    batches: tuple[int, int]

    @property
    def batch(self) -> int:
        return self.batches[CUDA]


SIZES = {
    "vits16-224": Size(384, 6, 6, 14, 57, 33, (8, 128)),
    "vitb16-224": Size(768, 6, 12, 14, 57, 33, (8, 128)),
    "vitl16-224": Size(1024, 12, 16, 14, 57, 33, (4, 128)),
    "vith14-224": Size(1280, 12, 16, 16, 74, 45, (2, 64)),
}
each_size = pytest.mark.parametrize("name", SIZES)
each_count = pytest.mark.parametrize("n_blocks", [N_BLOCKS, 2 * N_BLOCKS], ids=["one", "both"])


def draw_patches(side: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(*shape[:-1], side * side, generator=generator).argsort(-1)
    return order[..., : shape[-1]].sort(-1).values.to(DEVICE)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def record(
    benchmark: Any, step: Callable[[], Any], name: str, n_blocks: int, rounds: int, **info: Any
) -> None:
    def run() -> None:
        step()
        if CUDA:
            torch.cuda.synchronize()

    batch = SIZES[name].batch
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(run, rounds=20 * rounds if CUDA else rounds, warmup_rounds=2)
    benchmark.extra_info.update(
        size=f"{name}-b{batch}-l{n_blocks}",
        dtype=str(DTYPE).removeprefix("torch."),
        mode="fwdbwd",
        peak_bytes=torch.cuda.max_memory_allocated() if CUDA else None,
        images_per_s=batch / benchmark.stats.stats.median if benchmark.stats else None,
        **info,
    )


def predictor_flops(size: Size, n_blocks: int, shared: bool) -> int:
    """Matrix products, the backward as two forwards; test_shared_context.py counts a forward."""
    n_queries, length = n_blocks * size.n_targets, size.n_context + size.n_targets
    tokens, pairs = n_blocks * length, n_blocks * length**2
    if shared:
        tokens, pairs = size.n_context + n_queries, size.n_context**2 + n_queries * length
    ends = 2 * WIDTH * size.encoder_width * (size.n_context + n_queries)
    layer = 24 * WIDTH**2 * tokens + 4 * WIDTH * pairs
    last = WIDTH**2 * (6 * tokens + 18 * n_queries) + 4 * WIDTH * n_queries * length
    return 3 * size.batch * (ends + (size.depth - 1) * layer + last)


@each_size
@each_count
@pytest.mark.parametrize("impl", ["per_block", "per_block-compile", "shared", "shared-compile"])
def test_predictor(benchmark: Any, name: str, n_blocks: int, impl: str) -> None:
    size, shared = SIZES[name], impl.startswith("shared")
    torch.manual_seed(0)
    sizes = (size.encoder_width, WIDTH, size.depth, size.heads)
    published = PublishedPredictor(size.side, *sizes).to(DEVICE)
    stack = Stack(WIDTH, size.depth, size.heads, 4 * WIDTH)
    predictor = Predictor(sizes[0], (size.side,) * 2, stack, shared_context=shared).to(DEVICE)
    predictor.load_state_dict(published.state_dict())
    torch._dynamo.reset()
    call = torch.compile(predictor, fullgraph=True) if impl.endswith("compile") else predictor
    z = torch.randn(size.batch, size.n_context, size.encoder_width, device=DEVICE)
    context_idx = draw_patches(size.side, size.batch, size.n_context)
    target_idx = draw_patches(size.side, size.batch, n_blocks, size.n_targets)
    inputs = [z.requires_grad_(), *(p for p in predictor.parameters() if p.requires_grad)]

    def forward() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            out: Tensor = call(z, Masks(context_idx, target_idx))
        return out

    got = forward()
    with torch.no_grad():  # the first image, against code that shares none with njepa
        one = (z[:1], context_idx[:1], target_idx[:1])
        if shared:
            expected = dense_prediction(published.state_dict(), size.heads, *one)
        else:
            expected = published(z[:1], [context_idx[:1]], list(target_idx[:1].unbind(1)))
    assert relative(got.detach()[:: size.batch], expected) < TOLERANCE
    grad = torch.randn_like(got)
    record(
        benchmark, lambda: torch.autograd.grad(forward(), inputs, grad), name, n_blocks, 3,
        op="predictor", impl=impl, flops=predictor_flops(size, n_blocks, shared),
        bytes=sum(3 * x.nbytes for x in inputs) + 2 * got.nbytes,
    )  # fmt: skip


# The attention of a shared context


def all_tokens(context: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, Kc + L*Kt, e] of all tokens of an image."""
    tokens = torch.cat((context, queries.transpose(0, 1).flatten(1, 2)), dim=1)
    q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def as_rows(out: Tensor, n_context: int, n_blocks: int) -> Tensor:
    """[B, H, Kc + L*Kt, e] to the rows of ``shared_context.Segments``."""
    tokens = out.transpose(1, 2).flatten(2)
    queries = tokens[:, n_context:].unflatten(1, (n_blocks, -1)).transpose(0, 1)
    return torch.cat((tokens[:, :n_context].flatten(0, 1), queries.flatten(0, 2)))


def masked(size: Size, n_blocks: int) -> Attend:
    """One SDPA over all tokens under an additive mask."""
    allowed = may_attend(size.n_context, n_blocks, size.n_targets).to(DEVICE)
    mask = torch.zeros(allowed.shape, dtype=DTYPE, device=DEVICE)
    mask = mask.masked_fill(~allowed, float("-inf"))

    def attend(context: Tensor, queries: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*all_tokens(context, queries), attn_mask=mask)
        return as_rows(out, size.n_context, n_blocks)

    return attend


def flex(size: Size, n_blocks: int) -> Attend:
    """flex_attention under a block mask."""
    n_context, n_targets = size.n_context, size.n_targets
    length = n_context + n_blocks * n_targets

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (q - n_context) // n_targets == (k - n_context) // n_targets
        return (k < n_context) | ((q >= n_context) & same)

    mask = create_block_mask(allowed, None, None, length, length, device=DEVICE)
    compiled = torch.compile(flex_attention)

    def attend(context: Tensor, queries: Tensor) -> Tensor:
        return as_rows(
            compiled(*all_tokens(context, queries), block_mask=mask), n_context, n_blocks
        )

    return attend


def products(size: Size, n_blocks: int) -> Attend:
    """Plain products and one softmax over both segments: the context's keys are not copied."""

    def attend(context: Tensor, queries: Tensor) -> Tensor:
        qc, kc, vc = context.permute(2, 0, 3, 1, 4)  # [B, H, Kc, e]
        of_context = F.scaled_dot_product_attention(qc, kc, vc)
        q, k, v = queries.permute(3, 1, 4, 0, 2, 5)  # [B, H, L, Kt, e]
        q = q * q.shape[-1] ** -0.5
        over_context = (q.flatten(2, 3) @ kc.mT).unflatten(2, (n_blocks, -1))
        p = torch.cat((over_context, q @ k.mT), dim=-1).softmax(-1)
        p_context, p_own = p.split((size.n_context, size.n_targets), dim=-1)
        out = p_own @ v + (p_context.flatten(2, 3) @ vc).unflatten(2, (n_blocks, -1))
        return as_rows(torch.cat((of_context, out.flatten(2, 3)), 2), size.n_context, n_blocks)

    return attend


class _Merged(torch.autograd.Function):
    """Flash attention over two segments of keys, merged by their log-sum-exp.

    Backward: the flash backward of a segment with the output and log-sum-exp of the whole gives
    that segment's share of the gradients.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, kc: Tensor, vc: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [L*B, H, Kt, e]; kc, vc [B, H, Kc, e]."""
        ctx.n_blocks = len(q) // len(kc)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out_c, lse_c = flash(_Merged.by_image(q, ctx.n_blocks), kc, vc)
        out_c = out_c.unflatten(2, (ctx.n_blocks, -1)).movedim(2, 0).flatten(0, 1)
        lse_c = lse_c.unflatten(2, (ctx.n_blocks, -1)).movedim(2, 0).flatten(0, 1)
        out, lse = flash(q, k, v)
        whole = torch.logaddexp(lse, lse_c)
        out = out * (lse - whole).exp()[..., None] + out_c * (lse_c - whole).exp()[..., None]
        ctx.save_for_backward(q, kc, vc, k, v, out, whole)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, kc, vc, k, v, out, lse = ctx.saved_tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        wide = [_Merged.by_image(x, ctx.n_blocks) for x in (grads[0], q, out, lse)]
        dq_c, dkc, dvc = flash(wide[0], wide[1], kc, vc, wide[2], wide[3], 0.0, False)
        dq, dk, dv = flash(grads[0], q, k, v, out, lse, 0.0, False)
        dq = dq + dq_c.unflatten(2, (ctx.n_blocks, -1)).movedim(2, 0).flatten(0, 1)
        return dq, dkc, dvc, dk, dv

    @staticmethod
    def by_image(x: Tensor, n_blocks: int) -> Tensor:
        """[L*B, H, Kt, ...] to [B, H, L*Kt, ...]."""
        return x.unflatten(0, (n_blocks, -1)).movedim(0, 2).flatten(2, 3)


def merged(size: Size, n_blocks: int) -> Attend:
    """Queries over the context and over themselves by two flash calls, merged. CPU only."""

    def attend(context: Tensor, queries: Tensor) -> Tensor:
        qc, kc, vc = context.permute(2, 0, 3, 1, 4)
        of_context = F.scaled_dot_product_attention(qc, kc, vc).transpose(1, 2)
        q, k, v = queries.flatten(0, 1).permute(2, 0, 3, 1, 4)
        out = _Merged.apply(q, kc, vc, k, v).transpose(1, 2)
        return torch.cat((of_context.flatten(2).flatten(0, 1), out.flatten(2).flatten(0, 1)))

    return attend


def segments(size: Size, n_blocks: int) -> Attend:
    """Ours."""
    context = torch.empty(size.batch, size.n_context, 0)
    targets = torch.empty(size.batch, n_blocks, size.n_targets)
    ours = Segments.of(SDPA, context, targets, None)
    return partial(shared_context_attention, segments=ours)


WAYS = {f.__name__: f for f in (segments, masked, products, flex if CUDA else merged)}


@each_size
@each_count
@pytest.mark.parametrize("impl", WAYS)
def test_attention(benchmark: Any, name: str, n_blocks: int, impl: str) -> None:
    """From qkv rows to output rows, as one layer of the predictor calls it."""
    size = SIZES[name]
    head = WIDTH // size.heads
    torch.manual_seed(0)
    shapes = (size.batch, size.n_context), (n_blocks, size.batch, size.n_targets)
    qkv = [torch.randn(*shape, 3, size.heads, head, device=DEVICE) for shape in shapes]
    inputs = [x.to(DTYPE).requires_grad_() for x in qkv]
    attend = WAYS[impl](size, n_blocks)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = masked_in_fp64(*exact)
    grad = torch.randn(expected.shape, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*inputs), inputs, grad.to(DTYPE))

    assert relative(attend(*inputs), expected) < TOLERANCE
    for got, want in zip(step(), torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert relative(got, want) < TOLERANCE
    pairs = size.n_context**2 + n_blocks * size.n_targets * (size.n_context + size.n_targets)
    record(
        benchmark, step, name, n_blocks, 20,
        op="shared_context_attention", impl=impl, flops=14 * WIDTH * size.batch * pairs,
        bytes=sum(3 * x.nbytes for x in inputs) + 3 * grad.numel() * DTYPE.itemsize,
    )  # fmt: skip


def masked_in_fp64(context: Tensor, queries: Tensor) -> Tensor:
    n_context, n_blocks, n_targets = context.shape[1], queries.shape[0], queries.shape[2]
    q, k, v = all_tokens(context, queries)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    allowed = may_attend(n_context, n_blocks, n_targets).to(scores.device)
    out = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
    return as_rows(out, n_context, n_blocks)
