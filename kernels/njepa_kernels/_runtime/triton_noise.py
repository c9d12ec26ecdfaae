"""The noise stream of ``philox`` in Triton's language; imported by Triton kernels only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log(x):
    """ln x of normal fp32 to 2 ulp, also near 1, where lg2.approx keeps only absolute accuracy."""
    bits = x.to(tl.int32, bitcast=True)
    # x = 2^e m with m in [sqrt(1/2), sqrt(2)): 0x3F3504F3 is sqrt(1/2).
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    # ln m = 2 artanh s, s = f / (2 + f), |s| < 0.172.
    s = f / (f + 2.0)
    z = s * s
    series = z * (0.6666666667 + z * (0.4 + z * (0.2857142857 + z * 0.2222222222)))
    return s * (series + 2.0) + e.to(tl.float32) * 0.6931471805599453


@triton.jit
def _cos_sin(angle):
    """cos and sin of fp32 angles in [0, 2 pi], each to 1e-7; sin.approx is good to 5e-7 only."""
    quadrant = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi/2 in three parts of few bits, so that the products are exact without fma.
    r = angle - quadrant * 1.5703125
    r = r - quadrant * 4.837512969970703125e-4
    r = r - quadrant * 7.549789948768648e-8
    z = r * r
    sin = r + r * z * (
        -0.16666666667 + z * (8.3333333e-3 + z * (-1.98412698e-4 + z * 2.7557319e-6))
    )
    cos = 1.0 + z * (-0.5 + z * (4.16666667e-2 + z * (-1.38888889e-3 + z * 2.48015873e-5)))
    q = quadrant.to(tl.int32)
    swap = (q & 1) == 1
    cosine = tl.where(swap, sin, cos)
    sine = tl.where(swap, cos, sin)
    # cos is negative in quadrants 1 and 2, sin in 2 and 3.
    cosine = tl.where(((q + 1) & 2) == 2, -cosine, cosine)
    sine = tl.where((q & 2) == 2, -sine, sine)
    return cosine, sine


@triton.jit
def _box_muller(a, b):
    u = ((a >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    angle = (b >> 8).to(tl.float32) * 5.9604644775390625e-08 * 6.283185307179586
    radius = tl.sqrt_rn(_log(u) * -2.0)
    cosine, sine = _cos_sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def normals(
    sample, block, patch, seed, step, first_group, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Standard normals [ROWS, 4 * GROUPS] of ``philox.philox_normal``, in registers.

    ``sample``, ``block``, ``patch``: int64 [ROWS]; ``seed``, ``step``: int32 holding 32 bits.
    """
    group = (first_group + tl.arange(0, GROUPS)).to(tl.uint32)
    zero = tl.zeros([ROWS, GROUPS], tl.uint32)
    x0, x1, x2, x3 = tl.philox_impl(
        zero + sample.to(tl.uint32)[:, None],
        zero + block.to(tl.uint32)[:, None],
        zero + patch.to(tl.uint32)[:, None],
        zero + group[None, :],
        zero + seed.to(tl.uint32),
        zero + step.to(tl.uint32),
        10,
    )
    n0, n1 = _box_muller(x0, x1)
    n2, n3 = _box_muller(x2, x3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
