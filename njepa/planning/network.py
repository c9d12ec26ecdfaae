"""The shapes of a configuration: stacks of blocks, and who calls them how often.

B images of a micro-batch, N patches, Kc context tokens, Kt tokens of a target block, M blocks, D
and d widths of encoder and predictor, H hidden width of an MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from njepa.config import Config
from njepa.models.architecture import Architecture, architecture
from njepa.models.architecture import Stack as BlockStack


class Precision(NamedTuple):
    """Bytes per number of the parameters and the residual stream, and of what matmuls read."""

    parameter: int
    compute: int


class Shape(NamedTuple):
    """Token counts of one step."""

    context: int
    target: int


class Stack(BlockStack):
    """What a stack of pre-norm transformer blocks costs."""

    @property
    def matrix_parameters(self) -> int:
        """Weights and biases of qkv, proj, fc1 and fc2."""
        d, h = self.width, self.hidden
        return self.depth * (4 * d * d + 4 * d + 2 * d * h + h + d)

    @property
    def norm_parameters(self) -> int:
        """Two norms a block and the one behind the last."""
        return (2 * self.depth + 1) * 2 * self.width

    def flops(self, tokens: int) -> float:
        """Forward of all blocks, for one sequence."""
        return self.depth * self.block_flops(tokens, tokens**2)

    def block_flops(self, tokens: int, pairs: int, queries: int | None = None) -> float:
        """Forward of one block: 6nD^2 for qkv, 2n(D^2 + 2DH), and 4D for a pair of query and key.

        ``queries``: how many tokens go on behind qkv; None: all.
        """
        d, h = self.width, self.hidden
        behind = tokens if queries is None else queries
        return 6 * tokens * d * d + 2 * behind * (d * d + 2 * d * h) + 4 * d * pairs

    def block_bytes(self, precision: Precision, tokens: int, queries: int | None = None) -> int:
        """Saved for the backward by one block; ``queries`` as in ``block_flops``.

        The inputs of both norms in the type of the residual stream; the inputs of the four linear
        layers, q, k and v, and the input of GELU in that of the matmuls; mean and reciprocal
        deviation of two norms and the log-sum-exp of each head in fp32. Attention must not store
        its probabilities (any fused SDPA).
        """
        r, c = precision
        d, h = self.width, self.hidden
        behind = tokens if queries is None else queries
        to_qkv = tokens * (r * d + 8 + c * 4 * d)
        return to_qkv + behind * (r * d + 8 + c * (2 * d + 2 * h) + 4 * self.heads)

    def saved_bytes(
        self,
        rows: int,
        precision: Precision,
        checkpointed: bool = False,
        queries: int | None = None,
    ) -> int:
        """Saved by all blocks for ``rows`` tokens, and by the norm behind them.

        ``checkpointed``: the input of every block, and everything of the one that is recomputed.
        ``queries``: how many tokens leave the last block; None: all.
        """
        r, d = precision.parameter, self.width
        last = self.block_bytes(precision, rows, queries)
        full = self.block_bytes(precision, rows) if self.depth > 1 else last
        blocks = (self.depth - 1) * full + last
        if checkpointed:
            blocks = self.depth * rows * r * d + full
        return blocks + (rows if queries is None else queries) * (r * d + 8)

    def workspace_bytes(self, rows: int, precision: Precision) -> int:
        """Alive at once while one block runs, beyond what it saves: our estimate.

        Forward or backward, the largest are two tensors of the MLP's hidden width in the type of
        the matmuls, and three of the residual stream.
        """
        return rows * (precision.compute * 2 * self.hidden + precision.parameter * 3 * self.width)


@dataclass(frozen=True)
class Network:
    """What a configuration builds, and how often its predictors are called."""

    parts: Architecture
    passes: tuple[int, ...]
    """Blocks per image in each call of a predictor; the last call is the noised one."""
    fp8: bool = False
    """The target encoder's blocks multiply in fp8, where the run computes in bf16."""

    @property
    def patches(self) -> int:
        return math.prod(self.parts.grid)

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: 3 P^2."""
        return 3 * self.parts.patch_size**2

    @property
    def encoder(self) -> Stack:
        return Stack(*self.parts.encoder)

    @property
    def predictor(self) -> Stack:
        return Stack(*self.parts.predictor)

    @property
    def predictors(self) -> int:
        return 1 + self.parts.two_predictors

    @property
    def projector(self) -> tuple[int, ...]:
        """Widths from input to output; empty: none, or the identity."""
        return self.parts.projector or ()

    def predictor_rows(self, shape: Shape, blocks: int) -> int:
        """Tokens in the predictor for one image."""
        kc, kt = shape
        return kc + blocks * kt if self.parts.shared_context else blocks * (kc + kt)

    def predictor_flops(self, shape: Shape, blocks: int) -> float:
        """Forward of the predictor's blocks for one image; the queries alone leave the last."""
        (kc, kt), p = shape, self.predictor
        rows, queries = self.predictor_rows(shape, blocks), blocks * kt
        asked = queries * (kc + kt)
        pairs = asked + (kc * kc if self.parts.shared_context else blocks * kc * (kc + kt))
        return (p.depth - 1) * p.block_flops(rows, pairs) + p.block_flops(rows, asked, queries)

    @property
    def encoder_parameters(self) -> int:
        """Trained, and followed by the target encoder; the position table is not among them."""
        d = self.encoder.width
        matrices = self.encoder.matrix_parameters + (self.patch_values + 1) * d
        return matrices + self.encoder.norm_parameters

    @property
    def matrix_parameters(self) -> int:
        """Trained in Linear and Conv2d layers: those whose gradients autocast communicates low."""
        d, e = self.predictor.width, self.encoder.width
        predictor = self.predictor.matrix_parameters + (e + 1) * d + (d + 1) * e
        return (
            self.encoder_parameters
            - self.encoder.norm_parameters
            + self.predictors * predictor
            + sum(i * o for i, o in pairwise(self.projector))
        )

    @property
    def matrix_biases(self) -> int:
        """The biases among ``matrix_parameters``."""
        e, p = self.encoder, self.predictor
        blocks = [s.depth * (5 * s.width + s.hidden) for s in (e, p)]
        predictor = blocks[1] + p.width + e.width
        return blocks[0] + e.width + self.predictors * predictor

    @property
    def trained_parameters(self) -> int:
        d = self.predictor.width
        mask_tokens = 1 + self.parts.two_mask_tokens
        rest = self.predictors * self.predictor.norm_parameters + mask_tokens * d
        batch_norms = 2 * sum(self.projector[1:-1])
        return self.matrix_parameters + self.encoder.norm_parameters + rest + batch_norms

    @property
    def frozen_parameters(self) -> int:
        """Position tables of encoder and predictors."""
        return self.patches * (self.encoder.width + self.predictors * self.predictor.width)

    @property
    def target_parameters(self) -> int:
        """The target encoder with its position table, on every rank, in fp32."""
        return self.encoder_parameters + self.patches * self.encoder.width

    @property
    def fp8_weights(self) -> int:
        """Of the target encoder; it holds them in bf16, too."""
        d, h = self.encoder.width, self.encoder.hidden
        return self.encoder.depth * (4 * d * d + 2 * d * h) if self.fp8 else 0


def network(config: Config) -> Network:
    """Shapes of a configuration.

    Raises:
        ConfigError: sizes that cannot work.
    """
    parts, blocks = architecture(config), config.mask.n_targets
    passes: tuple[int, ...] = (blocks,)
    if parts.clean and parts.noised:
        passes = (blocks, blocks) if parts.two_predictors else (2 * blocks,)
    return Network(parts, passes, config.model.target_dtype == "fp8")


def vicreg_rows(config: Config, batch: int) -> int:
    """Rows that the projector sees with gradient."""
    return (config.mask.n_targets if config.vicreg.on == "pred_blocks" else 1) * batch
