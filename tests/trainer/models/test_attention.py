"""Attention over sequences of own lengths: what a kernel must compute, and blocks that use it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from njepa.data.batch import Lengths
from njepa.models.attention import Attention, Sdpa, Sequences
from njepa.models.attention_kernels import FLASH_FIRST
from njepa.models.block import Block
from tests.support.packed_attention import ATTENTION

COUNTS = (3, 7, 1, 4)
HEADS, WIDTH = 2, 8


def lengths(*counts: int) -> Lengths:
    return Lengths(counts, torch.tensor(counts))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(counts: tuple[int, ...], length: int, tail: int, row: int) -> list[int]:
    """The places of a sequence's tokens, by the words of the docstring."""
    n = counts[row % len(counts)]
    return [*range(n), *range(length - tail, length)]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(h)) v, spelled out, for one sequence: [n, H, h]."""
    scores = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khc->qhc", scores.softmax(-1), v)


@pytest.mark.parametrize(("tail", "repeat"), [(0, 1), (5, 3)], ids=["encoder", "predictor"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_each_sequence_attends_to_its_own_tokens(kind: str, tail: int, repeat: int):
    rows, length = repeat * len(COUNTS), max(COUNTS) + tail
    sequences = ATTENTION[kind].sequences(rows, length, lengths(*COUNTS), tail)
    inputs = draw(3, rows, length, HEADS * WIDTH).requires_grad_()
    q, k, v = (sequences.enter(x).unflatten(2, (HEADS, WIDTH)) for x in inputs)
    packed = kind != "padded"
    assert q.shape[:2] == ((1, (sum(COUNTS) + tail * len(COUNTS)) * repeat) if packed
                           else (rows, length))  # fmt: skip
    entered = sequences.kernel(q, k, v, sequences).flatten(2)
    out = sequences.leave(entered)
    weight = draw(rows, length, HEADS * WIDTH, seed=1)
    (out * weight).sum().backward()

    reference = inputs.detach().double().requires_grad_()
    expected = torch.zeros(rows, length, HEADS * WIDTH, dtype=torch.float64)
    for row in range(rows):
        own = tokens_of(COUNTS, length, tail, row)
        one = (x[row, own].unflatten(1, (HEADS, WIDTH)) for x in reference)
        expected[row, own] = attend(*one).flatten(1)
    (expected * weight).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)
    padding = reference.grad[2] == 0  # only where nothing attends is dv exactly 0
    assert padding.any()
    assert torch.equal(out == 0, padding)
    assert torch.count_nonzero(inputs.grad[:, padding]) == 0
    if tail:
        assert torch.equal(sequences.last(entered, tail), out[:, -tail:])


@pytest.mark.parametrize("queries", [(2, 5, 3, 3), (4, 4, 4, 4)], ids=["ragged", "dense"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_queries_over_keys_of_other_lengths(kind: str, queries: tuple[int, ...]):
    attention = ATTENTION[kind]
    ours = attention.sequences(4, max(queries), lengths(*queries))
    theirs = attention.sequences(4, max(COUNTS), lengths(*COUNTS))
    cross = ours.over(theirs)
    q, k, v = draw(4, max(queries), 16), *draw(2, 4, max(COUNTS), 16, seed=1)
    entered = (s.enter(x).unflatten(2, (2, 8)) for s, x in ((ours, q), (theirs, k), (theirs, v)))
    out = ours.leave(cross.kernel(*entered, cross).flatten(2))
    for row, (n, m) in enumerate(zip(queries, COUNTS, strict=True)):
        one = (x.unflatten(1, (2, 8)) for x in (q[row, :n], k[row, :m], v[row, :m]))
        torch.testing.assert_close(out[row, :n], attend(*one).flatten(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ATTENTION)
def test_equal_lengths_are_dense(kind: str):
    attention = ATTENTION[kind]
    dense = attention.sequences(6, 9, lengths(4, 4, 4), tail=5)
    assert (dense.mask, dense.index, dense.kernel) == (None, None, attention.dense)
    padded = attention.sequences(6, 10, lengths(4, 4, 4), tail=5)  # all equal, and yet padded
    assert padded.mask is not None or padded.index is not None
    x = draw(6, 9, 16)
    assert dense.enter(x) is x
    assert dense.leave(x) is x
    assert torch.equal(dense.last(x, 5), x[:, 4:])


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_block_is_timms_with_any_kernel(kind: str):
    """Same keys, same values: strictly for SDPA, which gets the tensors that timm's block gives."""
    torch.manual_seed(3)
    theirs = TimmBlock(16, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    ours = Block(16, 2, 64)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = draw(5, 6, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0], ATTENTION[kind].sequences(5, 6)), theirs(inputs[1])]
    for output in outputs:
        (output * draw(5, 6, 16, seed=1)).sum().backward()
    exact = {"rtol": 0.0, "atol": 0.0} if kind == "padded" else {}
    torch.testing.assert_close(*outputs, **exact)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **exact)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, **exact)


@pytest.mark.parametrize("kind", ["padded", "varlen"])
def test_a_ragged_block_is_one_graph(kind: str):
    block, attention = Block(16, 2, 64), ATTENTION[kind]
    if kind == "varlen":  # without the stand-in's checks, which read values
        attention = Attention(Sdpa(), Trivial())

    def run(x: torch.Tensor, own: Lengths) -> torch.Tensor:
        sequences = attention.sequences(4, 7, own)
        return sequences.leave(block(sequences.enter(x), sequences))

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    x = draw(4, 7, 16)
    torch.testing.assert_close(compiled(x, lengths(*COUNTS)), run(x, lengths(*COUNTS)))


@dataclass(frozen=True)
class Trivial:
    """A packing kernel that returns the values as they are."""

    name = "trivial"
    packs = True

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Sequences):
        return v


def test_an_order_ends_with_its_block_and_changes_no_value():
    """It only prefers: what none of the first backends can do falls to a later one."""
    q, k, v = draw(3, 2, 9, 2, 8)
    sequences = Attention().sequences(2, 9)
    before, plain = torch._C._get_sdp_priority_order(), Sdpa()(q, k, v, sequences)
    with Attention(order=FLASH_FIRST).ordered():
        first = torch._C._get_sdp_priority_order()[: len(FLASH_FIRST)]
        assert first == [int(backend) for backend in FLASH_FIRST]
        torch.testing.assert_close(Sdpa()(q, k, v, sequences), plain)
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.math_sdp_enabled()
