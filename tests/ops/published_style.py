"""A JEPA training script as others have it: published attributes, call signatures, row order.

Written from the published description (docs/method.md, section 1), in our own words; it knows
nothing of njepa_kernels. ``integrations.accelerate`` is to work on it without an edit.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


def apply_masks(x, masks):
    """The rows of x [B, N, D] that each mask [B, K] names; masks one after the other."""
    kept = [torch.gather(x, 1, m.unsqueeze(-1).expand(-1, -1, x.size(-1))) for m in masks]
    return torch.cat(kept, dim=0)


def repeat_interleave_batch(x, B, repeat):
    """Every group of B rows ``repeat`` times."""
    groups = x.split(B)
    return torch.cat([group for group in groups for _ in range(repeat)], dim=0)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        B, K, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, K, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, K, D))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def sincos(side, width):
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    parts = [f(c.reshape(-1, 1) * omega) for c in (x, y) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1)[None].float()


class Encoder(nn.Module):
    def __init__(self, side=4, patch=4, width=32, depth=2, heads=2):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.pos_embed = nn.Parameter(sincos(side, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def interpolate_pos_encoding(self, x, pos_embed):
        side, had = math.isqrt(x.shape[1]), math.isqrt(pos_embed.shape[1])
        if side == had:
            return pos_embed
        grid = pos_embed.unflatten(1, (had, had)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic")
        return grid.flatten(2).transpose(1, 2)

    def forward(self, x, masks=None):
        if masks is not None and not isinstance(masks, list):
            masks = [masks]
        x = self.patch_embed(x)
        x = x + self.interpolate_pos_encoding(x, self.pos_embed)
        if masks is not None:
            x = apply_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        if self.norm is not None:
            x = self.norm(x)
        return x


class Predictor(nn.Module):
    def __init__(self, side=4, encoder_width=32, width=16, depth=2, heads=2):
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = nn.Parameter(sincos(side, width), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, encoder_width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x, masks_x, masks):
        assert masks is not None
        assert masks_x is not None
        if not isinstance(masks_x, list):
            masks_x = [masks_x]
        if not isinstance(masks, list):
            masks = [masks]
        B = len(x) // len(masks_x)
        x = self.predictor_embed(x)
        positions = self.predictor_pos_embed.repeat(B, 1, 1)
        x += apply_masks(positions, masks_x)
        n_context = x.shape[1]
        positions = apply_masks(positions, masks)
        positions = repeat_interleave_batch(positions, B, repeat=len(masks_x))
        queries = self.mask_token.repeat(positions.size(0), positions.size(1), 1)
        queries += positions
        x = torch.cat([x.repeat(len(masks), 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, n_context:])


def make_step(encoder, predictor, target_encoder=None, optimizer=None, momentum=0.996, amp=False):
    """``train_step(images, masks_enc, masks_pred)`` -> the loss, after its backward and update."""
    if target_encoder is None:
        target_encoder = copy.deepcopy(encoder)
    for p in target_encoder.parameters():
        p.requires_grad = False

    def train_step(images, masks_enc, masks_pred):
        def forward_target():
            with torch.no_grad():
                h = target_encoder(images)
                h = F.layer_norm(h, (h.size(-1),))
                B = len(h)
                h = apply_masks(h, masks_pred)
                return repeat_interleave_batch(h, B, repeat=len(masks_enc))

        def forward_context():
            z = encoder(images, masks_enc)
            return predictor(z, masks_enc, masks_pred)

        def loss_fn(z, h):
            return F.smooth_l1_loss(z, h)

        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            h = forward_target()
            z = forward_context()
            loss = loss_fn(z, h)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                pairs = zip(encoder.parameters(), target_encoder.parameters(), strict=True)
                for param_q, param_k in pairs:
                    param_k.data.mul_(momentum).add_((1.0 - momentum) * param_q.detach().data)
        return loss.detach()

    return train_step


def draw_masks(batch, n, k_context, k_target, n_contexts=1, n_targets=4, seed=0):
    """Lists of int64 [B, K]: what the collator hands over."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count, k):
        ids = torch.rand(count, batch, n, generator=generator).argsort(dim=-1)[..., :k]
        return list(ids.sort(dim=-1).values)

    return draw(n_contexts, k_context), draw(n_targets, k_target)
