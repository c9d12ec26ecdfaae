"""A JEPA training script as others have it: published attributes, call signatures, row order.

It knows nothing of njepa_kernels: ``integrations.accelerate`` is to work on it without an edit. It
differs from the published code in its attention alone, which is PyTorch's fused one.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.published.networks import (
    Attention,
    Block,
    PublishedEncoder,
    PublishedPredictor,
    apply_masks,
    repeat_interleave_batch,
)


class FusedAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class FusedBlock(Block):
    attention = FusedAttention


class Encoder(PublishedEncoder):
    block = FusedBlock

    def __init__(self, side=4, patch=4, width=32, depth=2, heads=2):
        super().__init__(side, patch, width, depth, heads)


class Predictor(PublishedPredictor):
    block = FusedBlock

    def __init__(self, side=4, encoder_width=32, width=16, depth=2, heads=2):
        super().__init__(side, encoder_width, width, depth, heads)
        torch.nn.init.trunc_normal_(self.mask_token, std=0.02)


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
