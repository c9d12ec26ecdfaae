"""The encoder: a Vision Transformer, run on a subset of its tokens.

Shapes: B images, N patches, K kept patches, D width.
"""

from __future__ import annotations

import torch
from njepa_kernels import Impl
from torch import Tensor, nn
from torch.nn import functional as F

from njepa.config import Config
from njepa.data.batch import Lengths
from njepa.models.architecture import Stack, encoder_stack
from njepa.models.attention import SDPA, Attention
from njepa.models.block import build_blocks, build_last_norm, run_blocks
from njepa.models.init import init_generator, init_weights, rescale_by_depth
from njepa.models.patch_projection import PatchProjection
from njepa.models.positions import position_table


class Encoder(nn.Module):
    """A Vision Transformer without class token, with a frozen 2-D sin-cos position table.

    Parameter names, shapes and features of full images are those of timm's ``VisionTransformer(
    class_token=False, global_pool="avg", fc_norm=False, num_classes=0)``.
    """

    def __init__(
        self,
        size: Stack,
        image_size: int,
        patch_size: int,
        pos_scale: float = 1.0,
        impl: Impl = "auto",
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        attention: Attention = SDPA,
        checkpoint_blocks: bool = False,
        fused_block: bool = False,
    ) -> None:
        """``mean``, ``std``: normalise the bytes; see ``njepa.config.DataConfig``."""
        super().__init__()
        self.attention, self.checkpoint_blocks = attention, checkpoint_blocks
        table = position_table(size.width, (image_size // patch_size,) * 2, pos_scale)
        self.pos_embed: nn.Parameter = nn.Parameter(table.unsqueeze(0), requires_grad=False)
        # The layers draw their own defaults first; init_weights replaces them all.
        with torch.random.fork_rng(devices=[]):
            projection = PatchProjection(size.width, patch_size, mean, std, impl)
            self.patch_embed = nn.ModuleDict({"proj": projection})
            self.blocks = build_blocks(size, fused_block, impl)
            self.norm = build_last_norm(size.width, fused_block, impl)

    def forward(
        self, images: Tensor, idx: Tensor | None = None, lengths: Lengths | None = None
    ) -> Tensor:
        """Features after the final norm.

        Args:
            images: uint8 [B, S, S, 3].
            idx: int64 [B, K], the patches that enter the blocks, or None for all.
            lengths: how many of the K are patches of each image; the rest is padding. None: all.

        Returns:
            [B, K, D] or [B, N, D], zeros (without gradient) where there is padding. Masking comes
            after the positions and before the blocks, as in facebookresearch/ijepa,
            src/models/vision_transformer.py. Only the kept patches are embedded: patches do not see
            one another before the blocks, so the order is free.
        """
        pos = self.pos_embed
        # Under autocast the residual stream stays in the type of the parameters, as published.
        x = self.patch_embed["proj"](images, idx).to(pos.dtype)
        x = x + (pos if idx is None else F.embedding(idx, pos[0]))
        sequences = self.attention.sequences(x.shape[0], x.shape[1], lengths)
        x = run_blocks(self.blocks, sequences.enter(x), sequences, self.checkpoint_blocks)
        return sequences.leave(self.norm(x))


def build_encoder(config: Config, attention: Attention = SDPA) -> Encoder:
    """The encoder of a configuration, on CPU, with weights from stream ``init/encoder``."""
    model = config.model
    encoder = Encoder(
        encoder_stack(model),
        config.data.image_size,
        model.patch_size,
        model.pos_scale,
        config.impl.default,
        mean=config.data.mean,
        std=config.data.std,
        attention=attention,
        checkpoint_blocks=model.checkpoint_blocks,
        fused_block=model.fused_block,
    )
    init_weights(encoder, model, init_generator(config.run.seed, "encoder"))
    if model.depth_rescaled_init:
        rescale_by_depth(encoder.blocks)
    return encoder
