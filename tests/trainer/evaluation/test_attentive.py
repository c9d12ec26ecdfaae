"""The attentive probe against PyTorch's own attention, and on a task that a mean cannot solve."""

import pytest
import torch
from torch import nn

from njepa.evaluation import attentive
from njepa.evaluation.attentive import AttentiveHead, attentive_probe
from njepa.evaluation.splits import held_out


def test_the_head_is_cross_attention():
    """``nn.MultiheadAttention`` with the same matrices, a bias on the keys included: no effect."""
    width, heads, n = 16, 4, 7
    g = torch.Generator().manual_seed(0)
    head = AttentiveHead(width, heads, 3, g).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    reference = nn.MultiheadAttention(width, heads, batch_first=True).double()
    with torch.no_grad():
        eye = torch.eye(width, dtype=torch.float64)
        reference.in_proj_weight.copy_(
            torch.cat([eye, head.key.flatten(0, 1), head.value.flatten(0, 1)])
        )
        keys = torch.randn(width, generator=g, dtype=torch.float64)
        reference.in_proj_bias.copy_(
            torch.cat([torch.zeros(width), keys, head.value_bias.flatten()])
        )
        reference.out_proj.weight.copy_(eye)
        reference.out_proj.bias.zero_()
    tokens = torch.randn(5, n, width, generator=g, dtype=torch.float64)
    x = nn.functional.layer_norm(tokens, (width,), eps=1e-6)
    query = head.query.flatten().expand(5, 1, -1)
    y = head.query.flatten() + reference(query, x, x)[0][:, 0]
    expected = head.classifier(y + head.mlp(head.norm(y)))
    torch.testing.assert_close(head(tokens), expected)


@pytest.mark.slow
def test_it_finds_the_token_that_tells(monkeypatch):
    """One token in four carries the class and a mark; the others carry classes at random."""
    monkeypatch.setattr(attentive, "BATCH", 64)
    monkeypatch.setattr(attentive, "LEARNING_RATES", (1e-2, 1e-4))
    monkeypatch.setattr(attentive, "WEIGHT_DECAYS", (1e-3,))
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(640) % 4
    shown = torch.randint(0, 4, (640, 4), generator=g)
    place = torch.randint(0, 4, (640,), generator=g)
    shown[torch.arange(640), place] = labels
    tokens = 4 * nn.functional.one_hot(shown, 16).float()
    tokens[torch.arange(640), place, 8] = 4
    tokens += 0.1 * torch.randn(tokens.shape, generator=g)

    def probe(wanted):
        return attentive_probe(
            lambda ids: tokens[:512][ids], labels[:512], lambda ids: tokens[512:][ids], wanted,
            held_out(labels[:512], list("abcd")), width=16, heads=2, epochs=24,
        )  # fmt: skip

    result = probe(labels[512:])
    assert result.test.top1 > 90
    assert result.chosen[result.setting] > 90  # the heads that choose are trained too
    wrong = probe((labels[512:] + 1) % 4)  # the test images choose nothing
    assert (wrong.setting, wrong.chosen) == (result.setting, result.chosen)
    assert wrong.test.top1 < 10
