"""Attentive probe: one learnt query attends to the frozen tokens of an image.

    x = LN(tokens)                       without scale and shift: W_k and W_v can have them
    y = q + [W_v^h Σ_n softmax_n(q_h · W_k^h x_n / sqrt(e)) x_n + b_v^h]_h
    logits = W (y + MLP(LN(y))) + b

Source: V-JEPA (arXiv 2404.08471; evals/ and configs/evals/vitl16_in1k.yaml of its repository): one
query, one cross-attention block with the encoder's number of heads and an MLP of four widths, a
linear layer; AdamW, learning rate to zero by a cosine without warm-up, 20 epochs, gradients clipped
at 1. Ours: W_v acts after the sum over tokens, which is the same and far less work; the query has
no projection of its own; a small grid of settings is trained side by side on the same tokens and
the best on ``held_out`` is trained again on all training images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from njepa.draws.streams import permutation, stream_seed
from njepa.evaluation.accuracy import Accuracy, spread, wilson

LEARNING_RATES = (3e-3, 1e-3, 3e-4)
WEIGHT_DECAYS = (1e-3, 1e-1)
EPOCHS, BATCH = 20, 256

#: Frozen tokens, float32 [B, N, D], of sample numbers int64 [B].
Tokens = Callable[[Tensor], Tensor]


class Setting(NamedTuple):
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class AttentiveResult:
    test: Accuracy
    setting: Setting
    chosen: dict[Setting, float]
    """Percent right on the split of train, of every setting."""

    def as_json(self) -> dict[str, Any]:
        return {
            **self.test.as_json(),
            "head": self.setting._asdict(),
            "split": spread(self.chosen.values()),
        }


class AttentiveHead(nn.Module):
    """The probe; [B, N, D] to logits [B, C]."""

    def __init__(self, width: int, heads: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(heads, width // heads))
        self.key = nn.Parameter(torch.zeros(heads, width // heads, width))
        self.value = nn.Parameter(torch.zeros(heads, width // heads, width))
        self.value_bias = nn.Parameter(torch.zeros(heads, width // heads))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.classifier = nn.Linear(width, classes)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif not name.startswith("norm"):
                    nn.init.trunc_normal_(parameter, std=0.02, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        asked = torch.einsum("he,hed->hd", self.query, self.key) / math.sqrt(self.query.shape[1])
        weights = torch.softmax(x @ asked.T, dim=1)  # [B, N, H]
        pooled = torch.einsum("bnh,bnd->bhd", weights, x)
        values = torch.einsum("bhd,hed->bhe", pooled, self.value) + self.value_bias
        y = (self.query + values).flatten(1)
        y = y + self.mlp(self.norm(y))
        logits: Tensor = self.classifier(y)
        return logits


def attentive_probe(
    train: Tokens,
    labels: Tensor,
    test: Tokens,
    test_labels: Tensor,
    chooses: Tensor,
    width: int,
    heads: int,
    seed: int = 0,
    epochs: int = EPOCHS,
) -> AttentiveResult:
    """Choose a setting on a split of train, then test it once.

    Args:
        chooses: bool [n], training images that choose (``splits.held_out``).
        heads: of the attention; divides ``width``.
        seed: of weights and the order of the batches.
    """
    classes = int(labels.max()) + 1
    settings = [Setting(lr, wd) for lr in LEARNING_RATES for wd in WEIGHT_DECAYS]

    def build() -> AttentiveHead:  # every setting starts from the same weights
        generator = torch.Generator().manual_seed(stream_seed(seed, "init/attentive"))
        return AttentiveHead(width, heads, classes, generator).to(labels.device)

    rest, judged = (~chooses).nonzero().flatten(), chooses.nonzero().flatten()
    models = [build() for _ in settings]
    _train(models, settings, train, labels, rest, seed, epochs)
    right = _correct(models, train, labels, judged)
    chosen = {s: 100 * n / len(judged) for s, n in zip(settings, right, strict=True)}
    best = max(chosen, key=lambda setting: chosen[setting])  # the first of equals
    everything = torch.arange(len(labels), device=labels.device)
    final = [build()]
    _train(final, [best], train, labels, everything, seed, epochs)
    tested = torch.arange(len(test_labels), device=labels.device)
    (count,) = _correct(final, test, test_labels, tested)
    return AttentiveResult(wilson(count, len(test_labels)), best, chosen)


def _train(
    models: list[AttentiveHead],
    settings: list[Setting],
    tokens: Tokens,
    labels: Tensor,
    ids: Tensor,
    seed: int,
    epochs: int,
) -> None:
    solvers = [
        torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
        for model, s in zip(models, settings, strict=True)
    ]
    step, total = 0, epochs * math.ceil(len(ids) / BATCH)
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(seed, epoch, len(ids))).to(ids.device)
        for batch in ids[order].split(BATCH):
            x, y = tokens(batch), labels[batch]
            decay = 0.5 * (1 + math.cos(math.pi * step / total))
            for model, solver, setting in zip(models, solvers, settings, strict=True):
                solver.param_groups[0]["lr"] = setting.lr * decay
                solver.zero_grad()
                F.cross_entropy(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                solver.step()
            step += 1


@torch.no_grad()
def _correct(models: list[AttentiveHead], tokens: Tokens, labels: Tensor, ids: Tensor) -> list[int]:
    counts = [0] * len(models)
    for batch in ids.split(BATCH):
        x = tokens(batch)
        for k, model in enumerate(models):
            counts[k] += int((model(x).argmax(1) == labels[batch]).sum())
    return counts
