"""Randomness without state: order, crops, masks and sigmas as functions of (seed, step, sample id).

Every number is a word of Philox4x32-10 (``njepa_kernels``) whose key names the stream and the step
and whose counter names the sample, so it does not depend on what else is drawn, on the rank, on the
place of the sample in the batch, or on a restart.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from njepa_kernels import philox4x32

from njepa.config import did_you_mean

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

#: The streams that exist; a misspelt name would silently be another stream. ``init/<module>`` too.
STREAMS = (
    "order", "crop", "flip", "mask_size", "mask_place", "mask_count", "sigma", "noise", "scene",
)  # fmt: skip
_MASK32 = 0xFFFFFFFF  # Philox counts in words
_CHUNK = 1 << 14  # counters at a time: Philox runs inside the cache


@lru_cache(maxsize=256)
def stream_seed(seed: int, stream: str) -> int:
    """Seed in [0, 2^32) of a named stream of the run seed ``seed`` (taken mod 2^32).

    Word 0 of Philox at counter (CRC-32 of the name, 0, 0, 0) and key (seed, 0).

    Raises:
        ValueError: unknown stream; names are ``STREAMS`` and ``init/<module>``.
    """
    if stream not in STREAMS and not (stream.startswith("init/") and len(stream) > len("init/")):
        raise ValueError(
            f"unknown random stream {stream!r}{did_you_mean(stream, [*STREAMS])}; "
            f"expected one of {', '.join(STREAMS)} or init/<module>"
        )
    return int(philox4x32(zlib.crc32(stream.encode()), 0, 0, 0, seed & _MASK32, 0)[0])


def seed_of_try(seed: int, salt: int) -> int:
    """The seed behind order, crops, masks, sigmas and noise after ``salt`` rollbacks.

    ``run.seed`` itself without any; else word 0 of Philox at counter (CRC-32 of "rollback", salt,
    0, 0) and key (``run.seed``, 0). Weights are drawn from ``run.seed`` whatever the salt.
    """
    if salt == 0:
        return seed
    return int(philox4x32(zlib.crc32(b"rollback"), salt, 0, 0, seed & _MASK32, 0)[0])


def words(
    seed: int, stream: str, step: int, ids: Int64Array, count: int, attempt: int = 0
) -> Int64Array:
    """``count`` uint32 words for each of the n ids: int64 [n, count] in [0, 2^32).

    Word j of id i is word j mod 4 of Philox at key (``stream_seed``, step mod 2^32) and counter
    (i mod 2^32, i >> 32 mod 2^32, j div 4, attempt). ``attempt`` numbers fresh draws for the same
    id and step (rejection sampling).

    Raises:
        TypeError: ``ids`` is not an int64 array. ValueError: it is not one-dimensional.
    """
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64:
        raise TypeError(f"ids must be a numpy int64 array, got {getattr(ids, 'dtype', type(ids))}")
    if ids.ndim != 1:
        raise ValueError(f"ids must have shape [n], got {list(ids.shape)}")
    quads = -(-count // 4)
    out = np.empty((len(ids), quads, 4), dtype=np.int64)
    key, draws = stream_seed(seed, stream), np.arange(quads, dtype=np.int64)
    rows = max(1, _CHUNK // max(quads, 1))
    for start in range(0, len(ids), rows):
        i = ids[start : start + rows, None]
        quad = philox4x32(i & _MASK32, (i >> 32) & _MASK32, draws, attempt, key, step & _MASK32)
        for j, word in enumerate(quad):
            out[start : start + rows, :, j] = word
    return out.reshape(len(ids), 4 * quads)[:, :count]


def uniform(
    seed: int, stream: str, step: int, ids: Int64Array, count: int, attempt: int = 0
) -> Float64Array:
    """``words`` as float64 [n, count] in [0, 1): word times 2^-32, exactly."""
    return np.multiply(words(seed, stream, step, ids, count, attempt), 2.0**-32, dtype=np.float64)


def uniform_of_step(seed: int, stream: str, step: int) -> tuple[float, float, float, float]:
    """The first four ``uniform`` numbers of id 0: draws that the samples of a step share."""
    a, b, c, d = philox4x32(0, 0, 0, 0, stream_seed(seed, stream), step & _MASK32)
    return a * 2.0**-32, b * 2.0**-32, c * 2.0**-32, d * 2.0**-32


def permutation(seed: int, epoch: int, n: int) -> Int64Array:
    """The order of n samples in an epoch, int64 [n]: argsort of 64-bit keys of stream "order".

    Key i is words 2 (i mod 2) and 2 (i mod 2) + 1 of id i div 2 (high word first); equal keys keep
    the order of their indices.
    """
    if n < 0:
        raise ValueError(f"permutation of n samples needs n >= 0, got {n}")
    quads = words(seed, "order", epoch, np.arange((n + 1) // 2, dtype=np.int64), 4)
    pairs = quads.reshape(-1, 2)[:n].astype(np.uint64)
    return np.argsort(pairs[:, 0] << np.uint64(32) | pairs[:, 1], kind="stable")
