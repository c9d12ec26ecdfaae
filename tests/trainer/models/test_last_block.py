"""A block whose queries alone ask is the whole block, read at the queries, and computes no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from njepa.data.batch import Lengths, Masks
from njepa.models.architecture import Stack
from njepa.models.attention import Attention
from njepa.models.block import Block
from njepa.models.predictor import Predictor
from njepa.models.shared_context import Segments
from tests.support.packed_attention import ATTENTION

B, M, KC, KT, D, HEADS = 3, 2, 7, 4, 24, 2
Run = Callable[[Tensor, Tensor], Tensor]


def random_block() -> Block:
    block, g = Block(D, HEADS, 4 * D).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return block


def assert_same(block: Block, both: tuple[Run, Run]) -> None:
    """Predictions, and gradients of the tokens and of every parameter, fp64."""
    g = torch.Generator().manual_seed(1)
    context = torch.randn(B, KC, D, dtype=torch.float64, generator=g)
    queries = torch.randn(M * B, KT, D, dtype=torch.float64, generator=g)
    grad = torch.randn(M * B, KT, D, dtype=torch.float64, generator=g)
    results = []
    for run in both:
        inputs = [context.clone().requires_grad_(), queries.clone().requires_grad_()]
        out = run(*inputs)
        results.append([out, *torch.autograd.grad(out, [*inputs, *block.parameters()], grad)])
    for expected, got in zip(*results, strict=True):
        assert expected.norm() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [None, (7, 2, 5)], ids=["dense", "ragged"])
@pytest.mark.parametrize("kernel", ATTENTION)
def test_a_context_for_each_block(kernel: str, counts: tuple[int, ...] | None):
    attention: Attention = ATTENTION[kernel]
    block = random_block()
    lengths = None if counts is None else Lengths(counts, torch.tensor(counts))
    sequences = attention.sequences(M * B, KC + KT, lengths, tail=KT)
    queries_alone = attention.sequences(M * B, KT).over(sequences)

    def enter(context: Tensor, queries: Tensor) -> Tensor:
        return sequences.enter(torch.cat((context.repeat(M, 1, 1), queries), dim=1))

    assert_same(block, (
        lambda *x: sequences.last(block(enter(*x), sequences), KT),
        lambda *x: block(enter(*x), queries_alone),
    ))  # fmt: skip


@pytest.mark.parametrize("counts", [None, (7, 2, 5)], ids=["dense", "ragged"])
@pytest.mark.parametrize("kernel", ATTENTION)
def test_a_shared_context(kernel: str, counts: tuple[int, ...] | None):
    block = random_block()
    lengths = None if counts is None else Lengths(counts, torch.tensor(counts))
    target_idx = torch.zeros(B, M, KT, dtype=torch.int64)
    segments = Segments.of(ATTENTION[kernel], torch.zeros(B, KC, D), target_idx, lengths)
    alone = segments.of_queries_alone()
    assert_same(block, (
        lambda *x: segments.split(block(segments.join(*x), segments))[1].flatten(0, 1),
        lambda *x: block(segments.join(*x), alone).unflatten(0, (-1, KT)),
    ))  # fmt: skip


@pytest.mark.parametrize("shared", [False, True], ids=["per_block", "shared"])
def test_only_queries_pass_its_projection_and_mlp(shared: bool):
    predictor = Predictor(32, (6, 6), Stack(D, 2, HEADS, 4 * D), shared_context=shared)
    tokens: dict[str, int] = {}
    for name, layer in predictor.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(
                lambda _, x, y, name=name: tokens.update({name: x[0].numel() // x[0].shape[-1]})
            )
    idx = torch.arange(36).expand(B, -1)
    masks = Masks(idx[:, :KC], idx[:, : M * KT].unflatten(1, (M, KT)))
    predictor(torch.randn(B, KC, 32), masks)
    whole = B * KC + M * B * KT if shared else M * B * (KC + KT)
    assert tokens["predictor_blocks.0.attn.proj"] == tokens["predictor_blocks.0.mlp.fc2"] == whole
    assert tokens["predictor_blocks.1.attn.qkv"] == whole
    for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        assert tokens[f"predictor_blocks.1.{name}"] == M * B * KT
