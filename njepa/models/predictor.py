"""The predictor: from context tokens to the features of the target blocks.

Shapes: B images, M target blocks, Kc context tokens, Kt targets per block, N patches, D encoder
width, d predictor width.
"""

from __future__ import annotations

import torch
from njepa_kernels import Impl, NoiseKey, philox_normal, predictor_tokens
from torch import Tensor, nn
from torch.nn import functional as F

from njepa.config import Config
from njepa.data.batch import Masks, Noise
from njepa.models.architecture import Stack, architecture
from njepa.models.attention import SDPA, Attention
from njepa.models.block import Layout, Pending, build_blocks, build_last_norm, run_blocks
from njepa.models.init import init_generator, init_weights, rescale_by_depth
from njepa.models.positions import position_table
from njepa.models.shared_context import Segments


class Predictor(nn.Module):
    """The published predictor, with noise on the positions of its queries where sigma is given.

    Query of target j of block m: mask_token + psi_j (+ noise, see ``predictor_tokens``). Each block
    is predicted on its own from the whole context by full self-attention. Architecture and names:
    facebookresearch/ijepa, src/models/vision_transformer.py (``VisionTransformerPredictor``).

    With ``shared_context`` (ours) the context attends to itself only. It then does not
    depend on the queries, and all blocks share the one that is computed (``shared_context.py``).
    Parameters and their names are the same.
    """

    def __init__(
        self,
        encoder_width: int,
        grid: tuple[int, int],
        size: Stack,
        *,
        pos_scale: float = 1.0,
        tied_noise: bool = False,
        noise_mask_token: bool = False,
        shared_context: bool = False,
        impl: Impl = "auto",
        attention: Attention = SDPA,
        checkpoint_blocks: bool = False,
        fused_block: bool = False,
    ) -> None:
        """A predictor with torch's default weights.

        Args:
            tied_noise: draw the noise in the encoder's width and project it by
                ``predictor_embed`` without its bias (StoP, arXiv 2308.00566).
            noise_mask_token: noised queries start from a mask token of their own.

        """
        super().__init__()
        width = size.width
        self.tied_noise, self.impl = tied_noise, impl
        self.shared_context, self.attention = shared_context, attention
        self.checkpoint_blocks = checkpoint_blocks
        table = position_table(width, grid, pos_scale)
        # The layers draw their own defaults first; init_weights replaces them all.
        with torch.random.fork_rng(devices=[]):
            self.predictor_embed = nn.Linear(encoder_width, width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            self.predictor_pos_embed = nn.Parameter(table.unsqueeze(0), requires_grad=False)
            self.predictor_blocks = build_blocks(size, fused_block, impl)
            self.predictor_norm = build_last_norm(width, fused_block, impl)
            self.predictor_proj = nn.Linear(width, encoder_width)
            self.noise_mask_token: nn.Parameter | None = None
            if noise_mask_token:
                self.noise_mask_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(
        self, z: Tensor, masks: Masks, noise: Noise | None = None, with_clean: bool = False
    ) -> Tensor:
        """Predicted features [M*B, Kt, D], row m*B + b.

        Args:
            z: [B, Kc, D], encoded context. No token attends to its padding.
            noise: of the queries; None: clean ones.
            with_clean: both clean and noised predictions in one pass of the blocks: [2*M*B, Kt, D],
                the clean ones first.
        """
        context_idx, target_idx, lengths = masks
        tied = None
        if noise is not None and self.tied_noise:
            context, tied = self._embed_with_noise(z, target_idx, noise.key)
        else:
            context = self.predictor_embed(z)
        context = context.to(self.predictor_pos_embed.dtype)  # the residual stream is not autocast
        if with_clean or noise is None:
            tokens = self._tokens(context, masks, self.mask_token)
        if noise is not None:
            mask_token = self.mask_token if self.noise_mask_token is None else self.noise_mask_token
            noised = self._tokens(context, masks, mask_token, noise, tied)
            tokens = torch.cat((tokens, noised)) if with_clean else noised
        n_targets = target_idx.shape[2]
        if self.shared_context:
            kept = context + F.embedding(context_idx, self.predictor_pos_embed[0])
            every = target_idx.repeat(1, 2, 1) if with_clean else target_idx
            segments = Segments.of(self.attention, kept, every, lengths)
            queries = self._run_blocks(
                segments.join(kept, tokens), segments, segments.of_queries_alone()
            )
        else:
            sequences = self.attention.sequences(
                tokens.shape[0], tokens.shape[1], lengths, tail=n_targets
            )
            last = self.attention.sequences(sequences.rows, n_targets).over(sequences)
            queries = self._run_blocks(sequences.enter(tokens), sequences, last)
        rows = self.predictor_norm(queries)  # [M*B, Kt, d], or with a shared context flat
        features: Tensor = self.predictor_proj(rows.view(-1, n_targets, rows.shape[-1]))
        return features

    def _tokens(
        self,
        context: Tensor,
        masks: Masks,
        mask_token: Tensor,
        noise: Noise | None = None,
        tied: Tensor | None = None,
    ) -> Tensor:
        """The input of the blocks, [M*B, Kc+Kt, d]; with ``shared_context`` the queries alone.

        ``tied``: W n [B, M, Kt, d] in the place of noise drawn in the predictor's width.
        """
        drawn = noise if tied is None else None
        tokens = predictor_tokens(
            context[:, :0] if self.shared_context else context,
            self.predictor_pos_embed[0],
            mask_token.view(-1),
            masks.context_idx[:, :0] if self.shared_context else masks.context_idx,
            masks.target_idx,
            None if drawn is None else drawn.sigma,
            None if drawn is None else drawn.key,
            impl=self.impl,
        )
        if tied is None or noise is None:
            return tokens
        rows = (noise.sigma[..., None, None] * tied).transpose(0, 1).flatten(0, 1)
        rows = rows.to(tokens.dtype)
        return tokens + F.pad(rows, (0, 0, tokens.shape[1] - rows.shape[1], 0))

    def _run_blocks(self, tokens: Tensor, everything: Layout, queries: Layout) -> Tensor | Pending:
        """All tokens in, the queries out: no block behind the last one reads its other tokens."""
        *blocks, last = self.predictor_blocks
        stream = run_blocks(blocks, tokens, everything, self.checkpoint_blocks)
        return run_blocks([last], stream, queries, self.checkpoint_blocks)

    def _embed_with_noise(
        self, z: Tensor, target_idx: Tensor, noise: NoiseKey
    ) -> tuple[Tensor, Tensor]:
        """Embedded context [B, Kc, d], and W n [B, M, Kt, d] of the same layer, n ~ N(0, I_D).

        StoP's noise (arXiv 2308.00566) with the layer's bias taken out. One call of the layer on
        [z, n, 0], so that its weight is only touched inside its own forward (ZeRO-3).
        """
        batch, n_context, width = z.shape
        n = philox_normal(noise, target_idx, width)
        zero = z.new_zeros(batch, 1, width)
        rows = self.predictor_embed(torch.cat((z, n.flatten(1, 2).to(z.dtype), zero), dim=1))
        context, tied, bias = rows.split((n_context, rows.shape[1] - n_context - 1, 1), dim=1)
        return context, (tied - bias).unflatten(1, target_idx.shape[1:])


def build_predictor(
    config: Config, name: str, attention: Attention = SDPA, *, noise_mask_token: bool = False
) -> Predictor:
    """A predictor of the configuration, on CPU, with weights from stream ``init/<name>``.

    Args:
        name: "predictor" or "noise_predictor".
        noise_mask_token: a second mask token, for noised queries, drawn like that of
            "noise_predictor".
    """
    model, parts = config.model, architecture(config)
    predictor = Predictor(
        parts.encoder.width,
        parts.grid,
        parts.predictor,
        pos_scale=model.pos_scale,
        tied_noise=parts.tied_noise,
        noise_mask_token=noise_mask_token,
        shared_context=parts.shared_context,
        impl=config.impl.default,
        attention=attention,
        checkpoint_blocks=model.checkpoint_blocks,
        fused_block=model.fused_block,
    )
    generator = init_generator(config.run.seed, name)
    nn.init.trunc_normal_(predictor.mask_token, std=0.02, generator=generator)
    init_weights(predictor, model, generator)
    if model.depth_rescaled_init:
        rescale_by_depth(predictor.predictor_blocks)
    if predictor.noise_mask_token is not None:
        generator = init_generator(config.run.seed, "noise_predictor")
        nn.init.trunc_normal_(predictor.noise_mask_token, std=0.02, generator=generator)
    return predictor
