"""An independent N-JEPA step: Algorithm 1 of arXiv 2507.15216, written from docs/method.md.

The long way: one image and one target block at a time, Philox on Python integers, LayerNorm and
smooth-L1 spelled out. It shares no code with njepa or njepa_kernels. The transformers are those of
``bench.published``, and weights are plain dicts of tensors under the published names.

The logarithm, cosine and sine of the noise are torch's in fp32, because the noise is specified in
fp32 and other libraries differ from torch in the last bit. All else here is either exact or runs
in the type of the weights.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch.func import functional_call

from bench.published.networks import PublishedEncoder, PublishedPredictor


def philox4x32_10(counter, key):
    """Ten rounds of Salmon et al. (SC 2011): four words of 32 bits from four and two."""
    l0, r0, l1, r1 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(l0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(l1 * 0xCD9E8D57, 2**32)
        l0, r0, l1, r1 = high1 ^ r0 ^ k0, low1, high0 ^ r1 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) % 2**32  # the golden ratio
        k1 = (k1 + 0xBB67AE85) % 2**32  # sqrt(3) - 1
    return l0, r0, l1, r1


class NoiseStream(NamedTuple):
    """What names the noise of a batch; the two integers are the key of Philox."""

    seed: int
    step: int
    sample_ids: list[int]
    shared: bool
    """One draw for all blocks of an image (single-level) rather than one for each."""


def standard_normals(stream, image, block, patches, dim):
    """n of one block of one image: fp32 [Kt, dim].

    Counter (sample id, block, patch, c): four words, two pairs, for the channels 4c .. 4c+3.
    """
    key = (stream.seed % 2**32, stream.step % 2**32)
    sample, draw = stream.sample_ids[image] % 2**32, 0 if stream.shared else block
    lengths, turns = [], []
    for patch in patches.tolist():
        for c in range(dim // 4):
            w0, w1, w2, w3 = philox4x32_10((sample, draw, patch, c), key)
            lengths += [w0, w2]
            turns += [w1, w3]
    # 24 bits each, exact in fp32: the first in (0, 1], the second in [0, 1).
    u1 = torch.tensor([(w // 256 + 1) / 2**24 for w in lengths], dtype=torch.float32)
    u2 = torch.tensor([(w // 256) / 2**24 for w in turns], dtype=torch.float32)
    radius = torch.sqrt(-2 * torch.log(u1))
    angle = u2 * (2 * math.pi)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
    return pairs.reshape(len(patches), dim)


def depth_of(weights, blocks):
    return len({name.split(".")[1] for name in weights if name.startswith(blocks + ".")})


def side_of(table):
    return math.isqrt(table.shape[1])


@functools.cache
def skeleton(kind, *sizes):
    """A module without weights of its own."""
    with torch.device("meta"):
        return kind(*sizes)


def encode(weights, heads, image, kept=None):
    """Features [N or K, D] of one image [3, S, S], of the patches ``kept`` [K] alone if given."""
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    side, depth = side_of(weights["pos_embed"]), depth_of(weights, "blocks")
    encoder = skeleton(PublishedEncoder, side, patch, width, depth, heads)
    masks = None if kept is None else [kept[None]]
    return functional_call(encoder, weights, (image[None], masks), strict=True)[0]


class BlockPredictor(PublishedPredictor):
    """One target block of one image, its positions being an argument."""

    def forward(self, z, context_positions, target_positions):
        context = self.predictor_embed(z) + context_positions
        queries = self.mask_token[0] + target_positions
        x = torch.cat((context, queries))[None]
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[0, len(context) :]))


def predict(weights, heads, z, context, targets, noise=None):
    """Features [Kt, D] of the patches ``targets`` [Kt] from z [Kc, D] of the patches ``context``.

    ``noise`` [Kt, d] is added to the positions of the targets: psi_N = psi + n.
    """
    width, encoder_width = weights["predictor_embed.weight"].shape
    side = side_of(weights["predictor_pos_embed"])
    depth = depth_of(weights, "predictor_blocks")
    predictor = skeleton(BlockPredictor, side, encoder_width, width, depth, heads)
    psi = weights["predictor_pos_embed"][0]
    positions = psi[targets] if noise is None else psi[targets] + noise
    return functional_call(predictor, weights, (z, psi[context], positions), strict=True)


def layer_norm(x):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + 1e-5)


def smooth_l1(error):
    size = error.abs()
    return torch.where(size < 1, error**2 / 2, size - 0.5)


class NJepaLoss(NamedTuple):
    """The total and its three terms, all with gradients."""

    total: torch.Tensor
    ct: torch.Tensor
    nt: torch.Tensor
    cn: torch.Tensor


def njepa_loss(
    encoder, predictor, noise_predictor, target_encoder, heads,
    images, context_idx, target_idx, sigma, stream,
    lambda1=0.1, lambda2=0.1, stop="none",
):  # fmt: skip
    """L = L_CT + lambda1 L_NT + lambda2 L_CN.

    Args:
        encoder, predictor, noise_predictor, target_encoder: dicts of tensors. Predictors that share
            something hold the same tensors.
        heads: of encoder and predictors.
        images: [B, 3, S, S], normalised. context_idx: [B, Kc]. target_idx: [B, M, Kt].
        sigma: fp32 [B, M]. stream: a ``NoiseStream``.
        stop: whose prediction is a constant in L_CN: none, clean or noised.
    """
    dim = predictor["mask_token"].shape[-1]
    clean_errors, noised_errors, differences = [], [], []
    for b, image in enumerate(images):
        with torch.no_grad():
            y = layer_norm(encode(target_encoder, heads[0], image))
        z = encode(encoder, heads[0], image, context_idx[b])
        for m, targets in enumerate(target_idx[b]):
            n = sigma[b, m].to(z.dtype) * standard_normals(stream, b, m, targets, dim).to(z.dtype)
            clean = predict(predictor, heads[1], z, context_idx[b], targets)
            noised = predict(noise_predictor, heads[1], z, context_idx[b], targets, n)
            clean_errors.append(clean - y[targets])
            noised_errors.append(noised - y[targets])
            differences.append(
                (noised.detach() if stop == "noised" else noised)
                - (clean.detach() if stop == "clean" else clean)
            )
    # Every block has the same number of patches: the mean over blocks of means is this mean.
    ct = smooth_l1(torch.stack(clean_errors)).mean()
    nt = smooth_l1(torch.stack(noised_errors)).mean()
    cn = (torch.stack(differences) ** 2).mean()
    return NJepaLoss(ct + lambda1 * nt + lambda2 * cn, ct, nt, cn)
