"""The predictor: from context tokens to the features of the target blocks.

Shapes: B images, M target blocks, Kc context tokens, Kt targets per block, N patches, D encoder
width, d predictor width.
"""

from __future__ import annotations

import torch
from njepa_kernels import philox_normal, predictor_tokens
from njepa_kernels._dispatch import Impl
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from njepa.config import Config, NoiseConfig
from njepa.data.batch import Lengths
from njepa.models.attention import SDPA, Attention, Sequences, use_attention
from njepa.models.encoder import BlockNorm, EncoderSize, check_heads, encoder_size
from njepa.models.init import init_generator, init_weights, rescale_by_depth
from njepa.models.last_block import LastBlock
from njepa.models.positions import position_table, sincos
from njepa.models.recompute import run_blocks
from njepa.models.shared_context import Segments, share_context
from njepa.randomness import stream_seed


class Predictor(nn.Module):
    """The published predictor, with noise on the positions of its queries where sigma is given.

    Query of target j of block m: mask_token + psi_j (+ noise, see ``predictor_tokens``). Each block
    is predicted on its own from the whole context by full self-attention. Architecture and names:
    facebookresearch/ijepa, src/models/vision_transformer.py (``VisionTransformerPredictor``).

    With ``shared_context`` (our reading) the context attends to itself only. It then does not
    depend on the queries, and all blocks share the one that is computed (``shared_context.py``).
    Parameters and their names are the same.
    """

    def __init__(
        self,
        encoder_width: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        *,
        pos_scale: float = 1.0,
        noise: NoiseConfig | None = None,
        noise_seed: int = 0,
        shared_context: bool = False,
        impl: Impl = "auto",
        attention: Attention = SDPA,
        checkpoint_blocks: bool = False,
    ) -> None:
        """A predictor with torch's default weights.

        Args:
            depth: blocks, at least 1; the last is a ``LastBlock``.
            noise: how sigma acts; None for a predictor that never gets one.

        Raises:
            ValueError: ``depth`` below 1.
        """
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.noise, self.noise_seed, self.impl = noise, noise_seed, impl
        self.shared_context, self.attention = shared_context, attention
        self.checkpoint_blocks = checkpoint_blocks
        table = position_table(width, grid, pos_scale)
        # The layers draw their own defaults first; init_weights replaces them all.
        with torch.random.fork_rng(devices=[]):
            self.predictor_embed = nn.Linear(encoder_width, width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            self.predictor_pos_embed = nn.Parameter(table.unsqueeze(0), requires_grad=False)
            self.predictor_blocks = nn.ModuleList(
                block(width, heads, qkv_bias=True, norm_layer=BlockNorm)
                for block in (*[Block] * (depth - 1), LastBlock)
            )
            if shared_context:
                share_context(self.predictor_blocks)
            else:
                use_attention(self.predictor_blocks, attention)
            self.predictor_norm = BlockNorm(width)
            self.predictor_proj = nn.Linear(width, encoder_width)
            self.level_embed = None
            if noise is not None and noise.level_embedding == "add":
                self.level_embed = nn.Linear(width, width)  # last: it shifts no other draw

    def forward(
        self,
        z: Tensor,
        context_idx: Tensor,
        target_idx: Tensor,
        sigma: Tensor | None = None,
        sample_ids: Tensor | None = None,
        micro_step: int = 0,
        context_lengths: Lengths | None = None,
    ) -> Tensor:
        """Predicted features [M*B, Kt, D], row m*B + b.

        Args:
            z: [B, Kc, D], encoded context.
            context_idx: int64 [B, Kc]. target_idx: int64 [B, M, Kt].
            sigma: fp32 [B, M] or [B, M, Kt], or None for clean queries.
            sample_ids: int64 [B], needed with ``sigma``: the noise is a function of them, of
                ``micro_step`` and of the patch.
            context_lengths: how many of the Kc are patches of each image; the rest is padding,
                which no token attends to. None: all.

        Raises:
            ValueError: sigma without sample_ids, or on a predictor built without noise.
        """
        if sigma is not None and (self.noise is None or sample_ids is None):
            raise ValueError(
                "sigma needs sample_ids and a predictor built with noise=NoiseConfig(...), "
                f"got sample_ids={'None' if sample_ids is None else 'given'} and "
                f"noise={'None' if self.noise is None else 'given'}"
            )
        pos = self.predictor_pos_embed[0]
        tied = None
        if sigma is not None and self.noise is not None and self.noise.space == "encoder_tied":
            assert sample_ids is not None
            context, tied = self._embed_with_noise(z, target_idx, sample_ids, micro_step)
        else:
            context = self.predictor_embed(z)
        context = context.to(pos.dtype)  # as in the encoder: the residual stream is not autocast
        shared = self.shared_context
        direct = sigma is not None and tied is None
        tokens = predictor_tokens(
            context.new_empty(len(context), 0, pos.shape[1]) if shared else context,
            pos,
            self.mask_token.view(-1),
            context_idx[:, :0] if shared else context_idx,
            target_idx,
            sigma if direct else None,
            self.noise_seed,
            micro_step,
            sample_ids if direct else None,
            self.noise.mix if self.noise is not None else "ve",
            impl=self.impl,
        )
        n_targets = target_idx.shape[2]
        if sigma is not None and (tied is not None or self.level_embed is not None):
            extra = self._query_terms(sigma, F.embedding(target_idx, pos), tied)
            rows = extra.transpose(0, 1).flatten(0, 1).to(tokens.dtype)
            tokens = tokens + F.pad(rows, (0, 0, tokens.shape[1] - n_targets, 0))
        if shared:
            kept = context + F.embedding(context_idx, pos)
            segments = Segments.of(self.attention, kept, target_idx, context_lengths)
            tokens = self._run_blocks(
                segments.join(kept, tokens), segments, segments.of_queries_alone()
            )
            queries = tokens.unflatten(0, (-1, n_targets))
        else:
            sequences = self.attention.sequences(
                tokens.shape[0], tokens.shape[1], context_lengths, tail=n_targets
            )
            last = self.attention.sequences(sequences.rows, n_targets).over(sequences)
            queries = self._run_blocks(sequences.enter(tokens), sequences, last)
        features: Tensor = self.predictor_proj(self.predictor_norm(queries))
        return features

    def _run_blocks(
        self, tokens: Tensor, everything: Sequences | Segments, queries: Sequences | Segments
    ) -> Tensor:
        """All tokens in, the queries out: no block behind the last one reads its other tokens."""
        *blocks, last = self.predictor_blocks
        tokens = run_blocks(blocks, tokens, self.checkpoint_blocks, attn_mask=everything)
        return run_blocks([last], tokens, self.checkpoint_blocks, attn_mask=queries)

    def _embed_with_noise(
        self, z: Tensor, target_idx: Tensor, sample_ids: Tensor, micro_step: int
    ) -> tuple[Tensor, Tensor]:
        """Embedded context [B, Kc, d], and W n [B, M, Kt, d] of the same layer, n ~ N(0, I_D).

        StoP's noise (arXiv 2308.00566) with the layer's bias taken out. One call of the layer on
        [z, n, 0], so that its weight is only touched inside its own forward (ZeRO-3).
        """
        batch, n_context, width = z.shape
        n = philox_normal(self.noise_seed, micro_step, sample_ids, target_idx, width)
        zero = z.new_zeros(batch, 1, width)
        rows = self.predictor_embed(torch.cat((z, n.flatten(1, 2).to(z.dtype), zero), dim=1))
        context, noise, bias = rows.split((n_context, rows.shape[1] - n_context - 1, 1), dim=1)
        return context, (noise - bias).unflatten(1, target_idx.shape[1:])

    def _query_terms(self, sigma: Tensor, psi: Tensor, tied: Tensor | None) -> Tensor:
        """What is added to the queries beyond ``predictor_tokens``: [B, M, Kt, d], fp32."""
        assert self.noise is not None
        level = sigma.view(*sigma.shape, *([1] * (4 - sigma.dim())))
        total = torch.zeros((), device=psi.device)
        if tied is not None:
            # mix(psi, sigma, Wn) - psi, the forms of predictor_tokens.
            if self.noise.mix == "ve":
                total = level * tied
            else:
                damped = level * level * (1.0 if self.noise.mix == "vp" else 2.0)
                scale = 1.0 / (1.0 + damped).sqrt()  # exactly 1 at sigma = 0
                total = (scale - 1.0) * psi + scale * level * tied
        if self.level_embed is not None:
            # c_noise of EDM (arXiv 2206.00364), ln(sigma)/4; the floor keeps sigma = 0 finite.
            features = sincos(level.squeeze(-1).clamp(min=1e-3).log() / 4, psi.shape[-1])
            total = total + self.level_embed(features.to(psi.dtype))
        return total.expand_as(psi)


def check_sizes(config: Config) -> EncoderSize:
    """The encoder's size, once it and the predictor's are known to be possible.

    Raises:
        ConfigError: unknown encoder, or a width that heads or the position table cannot divide.
    """
    size, part = encoder_size(config.model), config.model.predictor
    check_heads("model.predictor", part.width, part.heads or size.heads)
    return size


def build_predictor(
    config: Config, name: str, noisy: bool, attention: Attention = SDPA
) -> Predictor:
    """A predictor of the configuration, on CPU, with weights from stream ``init/<name>``.

    Args:
        name: "predictor" or "noise_predictor".
        noisy: whether it gets sigma.
    """
    model, (width, _, heads, _) = config.model, check_sizes(config)
    part = model.predictor
    predictor = Predictor(
        width,
        config.grid,
        part.width,
        part.depth,
        part.heads or heads,
        pos_scale=model.pos_scale,
        noise=config.noise if noisy else None,
        noise_seed=stream_seed(config.run.seed, "noise"),
        shared_context=part.context == "shared",
        impl=config.impl.default,
        attention=attention,
        checkpoint_blocks=model.checkpoint_blocks,
    )
    generator = init_generator(config.run.seed, name)
    nn.init.trunc_normal_(predictor.mask_token, std=0.02, generator=generator)
    init_weights(predictor, model, generator)
    if model.depth_rescaled_init:
        rescale_by_depth(predictor.predictor_blocks)
    if predictor.level_embed is not None:
        nn.init.zeros_(predictor.level_embed.weight)
    return predictor
