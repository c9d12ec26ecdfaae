"""I-JEPA's networks and loss as the published code composes them (docs/method.md, section 1).

Attention as two products and a softmax, masks gathered one by one, the context repeated for every
block, all targets normalised before they are gathered.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Masks = Tensor | list[Tensor]
"""int64 [B, K], or several of them in a list."""


def as_list(masks: Masks) -> list[Tensor]:
    return masks if isinstance(masks, list) else [masks]


def apply_masks(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The rows of [B, N, D] that each mask [B, K] names, mask after mask: [len(masks) B, K, D]."""
    width = x.shape[-1]
    return torch.cat([x.gather(1, m.unsqueeze(-1).repeat(1, 1, width)) for m in masks])


def repeat_interleave_batch(x: Tensor, B: int, repeat: int) -> Tensor:
    """Each group of B rows ``repeat`` times in a row."""
    return torch.cat([group for group in x.split(B) for _ in range(repeat)])


def sincos(side: int, width: int) -> Tensor:
    """[1, side^2, width]: the column in the first half of the channels, the row in the second."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    places = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat((places.sin(), places.cos()), dim=1)
    column = axis.expand(side, side, width // 2)
    row = axis[:, None].expand(side, side, width // 2)
    return torch.cat((column, row), dim=2).reshape(1, side * side, width).float()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    attention: type[Attention] = Attention

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = self.attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class PublishedEncoder(nn.Module):
    """``hidden``: of the MLP, 4 width unless given."""

    block: type[Block] = Block

    def __init__(
        self, side: int, patch: int, width: int, depth: int, heads: int, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.pos_embed = nn.Parameter(sincos(side, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            self.block(width, heads, hidden or 4 * width) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def interpolate_pos_encoding(self, x: Tensor, pos_embed: Tensor) -> Tensor:
        """The table for the patches of x, resized where they are not as many as its rows."""
        if x.shape[1] == pos_embed.shape[1]:
            return pos_embed
        side, had = math.isqrt(x.shape[1]), math.isqrt(pos_embed.shape[1])
        grid = pos_embed.unflatten(1, (had, had)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic")
        return grid.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        """Features [B, N, D] of images [B, 3, S, S], or [len(masks) B, K, D] of what is kept."""
        x = self.patch_embed(x)
        x = x + self.interpolate_pos_encoding(x, self.pos_embed)
        if masks is not None:
            x = apply_masks(x, as_list(masks))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PublishedPredictor(nn.Module):
    block: type[Block] = Block

    def __init__(self, side: int, encoder_width: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sincos(side, width), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(
            self.block(width, heads, 4 * width) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, encoder_width)

    def forward(self, x: Tensor, masks_x: Masks, masks: Masks) -> Tensor:
        """Predictions [len(masks) len(masks_x) B, Kt, D] from x [len(masks_x) B, Kc, D]."""
        masks_x, masks = as_list(masks_x), as_list(masks)
        batch = len(x) // len(masks_x)
        x = self.predictor_embed(x)
        table = self.predictor_pos_embed.repeat(batch, 1, 1)
        x = x + apply_masks(table, masks_x)
        kept = x.shape[1]
        queries = repeat_interleave_batch(apply_masks(table, masks), batch, len(masks_x))
        queries = self.mask_token.repeat(len(queries), queries.shape[1], 1) + queries
        x = torch.cat((x.repeat(len(masks), 1, 1), queries), dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, kept:])


def published_targets(
    target_encoder: nn.Module, images: Tensor, context: list[Tensor], targets: list[Tensor]
) -> Tensor:
    """Normalised features of the blocks, [len(targets) len(context) B, Kt, D], without gradient."""
    with torch.no_grad():
        h = target_encoder(images)
        h = F.layer_norm(h, (h.shape[-1],))
        return repeat_interleave_batch(apply_masks(h, targets), len(images), len(context))


def published_loss(
    encoder: nn.Module, predictor: nn.Module, target_encoder: nn.Module,
    images: Tensor, context: list[Tensor], targets: list[Tensor],
) -> Tensor:  # fmt: skip
    """``context``: one [B, Kc] tensor in a list; ``targets``: a list of M tensors [B, Kt]."""
    h = published_targets(target_encoder, images, context, targets)
    return F.smooth_l1_loss(predictor(encoder(images, context), context, targets), h)
