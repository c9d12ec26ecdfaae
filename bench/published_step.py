"""The I-JEPA step composed as the published code composes it: the opponent of ``bench_step.py``.

Written from the description in docs/method.md, section 1, with torch alone: attention as two
products and a softmax, masks gathered one by one, the context repeated for every block, all targets
normalised before they are gathered, an average of weights parameter by parameter, four optimizer
groups, GradScaler with CUDA, masks drawn image by image. Parameter names are the published ones,
which are also those of njepa, so weights copy over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Phase = Callable[[str], AbstractContextManager[Any]]


def no_phase(name: str) -> AbstractContextManager[Any]:
    """Marks nothing: for steps that are timed as a whole."""
    return nullcontext()


class Size(NamedTuple):
    image: int
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    predictor_width: int
    predictor_depth: int
    predictor_heads: int


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos(width: int, side: int) -> Tensor:
    """[1, side^2, width]: the column in the first half of the channels, the row in the second."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    places = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat((places.sin(), places.cos()), dim=1)
    column = axis.expand(side, side, width // 2)
    row = axis[:, None].expand(side, side, width // 2)
    return torch.cat((column, row), dim=2).reshape(1, side * side, width).float()


def apply_masks(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The rows of [B, N, D] that each mask [B, K] names, mask after mask: [len(masks) B, K, D]."""
    width = x.shape[-1]
    return torch.cat([x.gather(1, m.unsqueeze(-1).repeat(1, 1, width)) for m in masks])


def repeat_groups(x: Tensor, batch: int, repeat: int) -> Tensor:
    """Each group of ``batch`` rows ``repeat`` times in a row."""
    return torch.cat([part for part in x.split(batch) for _ in range(repeat)])


class Patches(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class PublishedEncoder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        table = sincos(size.width, size.image // size.patch)
        self.patch_embed = Patches(size.patch, size.width)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(size.width, size.heads, size.hidden) for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(size.width, eps=1e-6)

    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        if masks is not None:
            x = apply_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PublishedPredictor(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.predictor_width
        table = sincos(width, size.image // size.patch)
        self.predictor_embed = nn.Linear(size.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        self.predictor_blocks = nn.ModuleList(
            Block(width, size.predictor_heads, 4 * width) for _ in range(size.predictor_depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, size.width)

    def forward(self, z: Tensor, context: list[Tensor], targets: list[Tensor]) -> Tensor:
        batch = len(z) // len(context)
        x = self.predictor_embed(z)
        table = self.predictor_pos_embed.repeat(batch, 1, 1)
        x = x + apply_masks(table, context)
        kept = x.shape[1]
        queries = repeat_groups(apply_masks(table, targets), batch, len(context))
        queries = self.mask_token.repeat(len(queries), queries.shape[1], 1) + queries
        x = torch.cat((x.repeat(len(targets), 1, 1), queries), dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, kept:])


def optimizer_groups(encoder: nn.Module, predictor: nn.Module) -> list[dict[str, Any]]:
    """Weights, then biases and norms, of either network; the latter two without decay."""
    groups = []
    for plain in (False, True):
        for module in (encoder, predictor):
            chosen = [
                p for name, p in module.named_parameters()
                if ("bias" in name or p.dim() == 1) == plain
            ]  # fmt: skip
            groups.append({"params": chosen, **({"weight_decay": 0.0} if plain else {})})
    return groups


class PublishedStep:
    """Encoder, predictor, target encoder, optimizer; a call is a step and returns its loss.

    Args:
        state: weights by published names, ``encoder.*`` and ``predictor.*``.
        low: bf16 autocast.
        compiled: ``torch.compile`` of the three networks, shapes dynamic where they change.
    """

    def __init__(
        self, size: Size, state: dict[str, Tensor], device: torch.device, low: bool, compiled: bool,
        lr: float = 1e-4, weight_decay: float = 0.04, momentum: float = 0.996,
    ) -> None:  # fmt: skip
        self.device, self.low, self.momentum = device, low, momentum
        self.encoder, self.predictor = PublishedEncoder(size), PublishedPredictor(size)
        for name in ("encoder", "predictor"):
            part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)}
            getattr(self, name).load_state_dict(part)
        self.encoder.to(device)
        self.predictor.to(device)
        self.target = deepcopy(self.encoder).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(self.encoder, self.predictor), lr=lr, weight_decay=weight_decay
        )
        self.scaler = torch.amp.GradScaler("cuda") if low and device.type == "cuda" else None
        self._networks = (self.encoder, self.predictor, self.target)
        if compiled:
            self._networks = tuple(torch.compile(network) for network in self._networks)

    def loss(
        self, images: Tensor, context: list[Tensor], targets: list[Tensor], phase: Phase = no_phase
    ) -> Tensor:
        encoder, predictor, target = self._networks
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            with torch.no_grad(), phase("target"):
                h = target(images)
                h = F.layer_norm(h, (h.shape[-1],))
                h = repeat_groups(apply_masks(h, targets), len(images), len(context))
            with phase("context"):
                z = encoder(images, context)
            with phase("predictor"):
                p = predictor(z, context, targets)
            with phase("loss"):
                return F.smooth_l1_loss(p, h)

    def __call__(
        self, images: Tensor, context: list[Tensor], targets: list[Tensor], phase: Phase = no_phase
    ) -> Tensor:
        loss = self.loss(images, context, targets, phase)
        with phase("backward"):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        with phase("optimizer"):
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.optimizer.zero_grad()
        with phase("EMA"), torch.no_grad():
            for q, k in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
                k.data.mul_(self.momentum).add_((1.0 - self.momentum) * q.detach().data)
        return loss.detach()


class PublishedCollator:
    """Multi-block masks drawn image by image, as the published collator does in loader workers.

    Args:
        grid: patches per side. The other arguments are the published defaults.
    """

    def __init__(
        self, grid: int, blocks: int = 4, target_scale: tuple[float, float] = (0.15, 0.2),
        context_scale: tuple[float, float] = (0.85, 1.0), aspect: tuple[float, float] = (0.75, 1.5),
        min_keep: int = 10,
    ) -> None:  # fmt: skip
        self.grid, self.blocks, self.min_keep = grid, blocks, min_keep
        self.target_scale, self.context_scale, self.aspect = target_scale, context_scale, aspect
        self.step = -1

    def __call__(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Context masks, a list of one [B, Kc], and target masks, a list of M [B, Kt]."""
        self.step += 1
        own = torch.Generator().manual_seed(self.step)
        target = self._size(own, self.target_scale, self.aspect)
        context = self._size(own, self.context_scale, (1.0, 1.0))
        contexts: list[Tensor] = []
        targets: list[list[Tensor]] = [[] for _ in range(self.blocks)]
        for _ in range(batch):
            outside = []
            for column in targets:
                kept, free = self._block(target, [])
                column.append(kept)
                outside.append(free)
            contexts.append(self._block(context, outside)[0])
        shortest = min(len(kept) for kept in contexts)
        cut = torch.stack([kept[:shortest] for kept in contexts])
        return [cut], [torch.stack(column) for column in targets]

    def _size(
        self, own: torch.Generator, scale: tuple[float, float], aspect: tuple[float, float]
    ) -> tuple[int, int]:
        r = torch.rand(1, generator=own).item()
        area = int(self.grid**2 * (scale[0] + r * (scale[1] - scale[0])))
        ratio = aspect[0] + r * (aspect[1] - aspect[0])
        most = self.grid - 1
        return (
            min(round(math.sqrt(area * ratio)), most),
            min(round(math.sqrt(area / ratio)), most),
        )

    def _block(self, size: tuple[int, int], outside: list[Tensor]) -> tuple[Tensor, Tensor]:
        height, width = size
        tries = 0
        while True:
            top = torch.randint(0, self.grid - height, (1,))
            left = torch.randint(0, self.grid - width, (1,))
            mask = torch.zeros((self.grid, self.grid), dtype=torch.int32)
            mask[top : top + height, left : left + width] = 1
            for free in outside[: max(len(outside) - tries // 20, 0)]:
                mask *= free
            kept = torch.nonzero(mask.flatten()).squeeze(1)
            if len(kept) > self.min_keep:
                break
            tries += 1
        free = torch.ones((self.grid, self.grid), dtype=torch.int32)
        free[top : top + height, left : left + width] = 0
        return kept, free
