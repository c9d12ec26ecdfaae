"""An independent I-JEPA step, written from the published description (docs/method.md, section 1).

Everything the long way: masks as lists, context repeated per block, a loop over blocks, softmax
attention spelled out. It shares no code with njepa, only the published parameter names.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        d = x.shape[-1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = []
        for head in range(self.heads):
            own = slice(head * d // self.heads, (head + 1) * d // self.heads)
            scores = q[..., own] @ k[..., own].mT * (d // self.heads) ** -0.5
            out.append(scores.softmax(dim=-1) @ v[..., own])
        return self.proj(torch.cat(out, dim=-1))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(0.5 * x * (1 + torch.erf(x / math.sqrt(2))))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos_table(width, side):
    """Row-major grid; column coordinate in the first half of the channels, row in the second."""
    table = torch.zeros(side * side, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for half, coordinate in enumerate((column, row)):
                for i in range(quarter):
                    angle = coordinate / 10000 ** (i / quarter)
                    table[row * side + column, half * 2 * quarter + i] = math.sin(angle)
                    table[row * side + column, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table.float()


def apply_masks(x, masks):
    """For a list of index tensors [B, K]: the kept rows, one mask after the other along dim 0."""
    kept = []
    for mask in masks:
        kept.append(torch.gather(x, 1, mask[:, :, None].expand(-1, -1, x.shape[-1])))
    return torch.cat(kept, dim=0)


def repeat_interleave_batch(x, batch, repeat):
    groups = x.shape[0] // batch
    return torch.cat(
        [torch.cat([x[i * batch : (i + 1) * batch]] * repeat, dim=0) for i in range(groups)], dim=0
    )


class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class PublishedEncoder(nn.Module):
    def __init__(self, side, patch, width, depth, heads):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.pos_embed = nn.Parameter(sincos_table(width, side)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, masks=None):
        x = self.patch_embed(x) + self.pos_embed
        if masks is not None:
            x = apply_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PublishedPredictor(nn.Module):
    def __init__(self, side, encoder_width, width, depth, heads):
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sincos_table(width, side)[None], False)
        self.predictor_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, encoder_width)

    def forward(self, x, masks_x, masks):
        batch = len(x) // len(masks_x)
        x = self.predictor_embed(x)
        x = x + apply_masks(self.predictor_pos_embed.expand(batch, -1, -1), masks_x)
        n_context = x.shape[1]
        queries = apply_masks(self.predictor_pos_embed.expand(batch, -1, -1), masks)
        queries = repeat_interleave_batch(queries, batch, repeat=len(masks_x))
        queries = queries + self.mask_token
        x = torch.cat([x.repeat(len(masks), 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, n_context:])


def published_loss(encoder, predictor, target_encoder, images, masks_enc, masks_pred):
    """``masks_enc``: one [B, Kc] tensor in a list; ``masks_pred``: a list of M tensors [B, Kt]."""
    with torch.no_grad():
        h = target_encoder(images)
        h = F.layer_norm(h, (h.size(-1),))
        h = apply_masks(h, masks_pred)
        h = repeat_interleave_batch(h, len(images), repeat=len(masks_enc))
    z = predictor(encoder(images, masks_enc), masks_enc, masks_pred)
    return F.smooth_l1_loss(z, h)
