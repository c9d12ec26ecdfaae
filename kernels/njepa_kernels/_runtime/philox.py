"""The noise stream shared by every implementation: Philox4x32-10 and Box-Muller.

Philox4x32-10 is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011). It has no state: the same key and counter always give the same four words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .checks import INDEX, check_index_range, check_tensor

MASK32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_TWO_PI = 6.283185307179586


class NoiseKey(NamedTuple):
    """What the noise of a batch is a function of, besides block, patch and channel.

    Attributes:
        seed: any Python int; it counts modulo 2^32.
        step: the same, or int64 on the device of the batch, 0-dim: a captured CUDA graph reads it
            at every replay, where an int is that of the capture.
        sample_ids: int64 [B], on the device of the batch; they count modulo 2^32.
        shared: the noise of a patch is the same in all blocks of an image, that of block 0.
    """

    seed: int
    step: int | torch.Tensor
    sample_ids: torch.Tensor
    shared: bool = False


def check_noise(op: str, noise: NoiseKey, batch: int, device: torch.device) -> None:
    """Raise unless ``noise`` is a ``NoiseKey`` for ``batch`` samples on ``device``.

    By its fields: a caller may hold the class of an installed package, the op be a vendored copy.
    """
    if getattr(noise, "_fields", None) != NoiseKey._fields:
        raise TypeError(
            f"{op}: noise must be a NoiseKey(seed, step, sample_ids, shared=False), "
            f"got {type(noise).__name__}"
        )
    for name in ("seed", "step"):
        value = getattr(noise, name)
        if name == "step" and isinstance(value, torch.Tensor):
            check_tensor(op, "noise.step", value, "[]", (), dtypes=INDEX, device=device)
            continue
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            kinds = "an int" if name == "seed" else "an int or an int64 tensor"
            raise TypeError(f"{op}: noise.{name} must be {kinds}, got {type(value).__name__}")
    if not isinstance(noise.shared, bool):
        raise TypeError(f"{op}: noise.shared must be a bool, got {type(noise.shared).__name__}")
    check_tensor(
        op, "noise.sample_ids", noise.sample_ids, "[B]", (batch,), dtypes=INDEX, device=device
    )


class Words(NamedTuple):
    """What a kernel takes of a ``NoiseKey``."""

    seed: int = 0
    """Modulo 2^32."""
    step: int = 0
    """Modulo 2^32; 0 where it is a tensor."""
    step_tensor: torch.Tensor | None = None
    sample_ids: torch.Tensor | None = None
    shared: bool = False


def words_of(noise: NoiseKey | None) -> Words:
    """Zeros for no noise."""
    if noise is None:
        return Words()
    seed, (ids, shared) = noise.seed & MASK32, noise[2:]
    if isinstance(noise.step, torch.Tensor):
        return Words(seed, 0, noise.step, ids, shared)
    return Words(seed, noise.step & MASK32, None, ids, shared)


def philox4x32(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Four uint32 words of Philox4x32-10 for the counter (c0, c1, c2, c3) and the key (k0, k1).

    Only operators are used, so torch int64 tensors, numpy int64 arrays (of at least one dimension)
    and Python ints all work and give the same words. Each argument must hold values in [0, 2^32);
    arguments broadcast against one another. The words come back as int64 in [0, 2^32).
    """
    for _ in range(_ROUNDS):
        # The int64 product wraps, but its 64 bits are those of the unsigned product; the arithmetic
        # shift smears the sign into bits 32..63 only, and the mask below drops those.
        p0 = c0 * _MULTIPLIER_0
        p1 = c2 * _MULTIPLIER_1
        # c1 and c3 stay unmasked (they only meet an xor that is masked): two operations less.
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & MASK32, p1, ((p0 >> 32) ^ c3 ^ k1) & MASK32, p0
        k0 = (k0 + _WEYL_0) & MASK32
        k1 = (k1 + _WEYL_1) & MASK32
    return c0, c1 & MASK32, c2, c3 & MASK32


def _box_muller(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two standard normals (fp32) from two uint32 words; |n| <= sqrt(48 ln 2) = 5.77."""
    # 24 bits are exact in fp32; the +1 keeps u1 in (0, 1], so the logarithm is finite.
    u1 = ((a >> 8) + 1).to(torch.float32) * 2.0**-24
    angle = (b >> 8).to(torch.float32) * 2.0**-24 * _TWO_PI
    radius = (u1.log() * -2.0).sqrt()
    return radius * angle.cos(), radius * angle.sin()


def philox_normal(noise: NoiseKey, patches: torch.Tensor, dim: int) -> torch.Tensor:
    """Standard normals [B, M, Kt, dim], fp32, on the device of ``patches``.

    key = (seed mod 2^32, step mod 2^32);
    counter = (sample id mod 2^32, block, patch, g) gives the dims 4g .. 4g+3 by Box-Muller in fp32:
    u1 = ((x0 >> 8) + 1) 2^-24, u2 = (x1 >> 8) 2^-24, r = sqrt(-2 ln u1),
    n_{4g} = r cos 2 pi u2, n_{4g+1} = r sin 2 pi u2; the words x2, x3 give n_{4g+2}, n_{4g+3}.
    The block is m, or 0 for all m where ``noise.shared``.

    The patch coordinate is the *position in the grid* (``target_idx[b, m, t]``), not t: the noise
    of a patch does not depend on the order of the patches inside its block. It depends neither on
    the row of the sample in the batch, nor on the other samples, nor on the number of ranks.

    Args:
        noise: seed, step, sample ids [B], and whether the blocks of an image share the noise.
        patches: int64 [B, M, Kt], in [0, 2^32).
        dim: number of normals per token; if it is no multiple of 4 the last group is cut.

    Raises:
        TypeError, ValueError: wrong type, shape or device, or a patch out of range.
    """
    op = "philox_normal"
    check_tensor(op, "patches", patches, "[B,M,Kt]", dtypes=INDEX)
    batch, n_blocks, _ = patches.shape
    check_noise(op, noise, batch, patches.device)
    check_index_range(op, "patches", patches, MASK32 + 1)
    if dim < 0:
        raise ValueError(f"{op}: dim must be at least 0, got {dim}")
    words = words_of(noise)
    blocks = torch.arange(n_blocks, device=patches.device)
    if words.shared:
        blocks = torch.zeros_like(blocks)
    groups = (dim + 3) // 4
    x0, x1, x2, x3 = philox4x32(
        (noise.sample_ids & MASK32).view(-1, 1, 1, 1),
        blocks.view(1, -1, 1, 1),
        patches.unsqueeze(-1),
        torch.arange(groups, device=patches.device),
        words.seed,
        words.step if words.step_tensor is None else words.step_tensor & MASK32,
    )
    normals = torch.stack((*_box_muller(x0, x1), *_box_muller(x2, x3)), dim=-1)
    return normals.flatten(-2)[..., :dim]
