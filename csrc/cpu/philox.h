// The noise stream: Philox4x32-10 and Box-Muller, as njepa_kernels/_runtime/philox.py defines it.
#pragma once

#include "simd.h"

namespace njepa::NJEPA_ISA {

// One 32-bit word per 64-bit lane; what the upper halves hold does not matter.
typedef uint64_t vw __attribute__((vector_size(4 * W)));

NJEPA_INLINE vw multiply(vw a, uint32_t b) {
#if defined(__AVX512F__)
  return (vw)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vw)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (vw)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

struct Words {
  vw x0, x1, x2, x3;
};

NJEPA_INLINE Words philox(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const vw p0 = multiply(c.x0, 0xD2511F53u), p1 = multiply(c.x2, 0xCD9E8D57u);
    c = {(p1 >> 32) ^ c.x1 ^ k0, p1, (p0 >> 32) ^ c.x3 ^ k1, p0};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

#if defined(__clang__)
#define NJEPA_SHUFFLE_LOOPS  // clang has no __builtin_shuffle with a computed mask
#endif

// The low words of two vectors, in order.
NJEPA_INLINE vu join(vw low, vw high) {
#ifdef NJEPA_SHUFFLE_LOOPS
  vu out;
  for (int i = 0; i < W / 2; ++i) {
    out[i] = static_cast<uint32_t>(low[i]);
    out[i + W / 2] = static_cast<uint32_t>(high[i]);
  }
  return out;
#else
  vu even;
  for (int i = 0; i < W; ++i) even[i] = 2 * i;  // of the 2 W words of both, little-endian
  return __builtin_shuffle((vu)low, (vu)high, even);
#endif
}

// out[4 i + j] = n[j][i]
NJEPA_INLINE void store_interleaved(const vf n[4], float* out) {
#ifdef NJEPA_SHUFFLE_LOOPS
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < 4; ++j) out[4 * i + j] = n[j][i];
#else
  vu low;
  vw low_pairs;
  for (int i = 0; i < W; ++i) low[i] = i / 2 + (i % 2) * W;
  for (int i = 0; i < W / 2; ++i) low_pairs[i] = i / 2 + (i % 2) * (W / 2);
  for (int half = 0; half < 2; ++half) {
    const vw a = (vw)__builtin_shuffle(n[0], n[1], low + half * (W / 2));
    const vw b = (vw)__builtin_shuffle(n[2], n[3], low + half * (W / 2));
    store(out + 2 * W * half, (vf)__builtin_shuffle(a, b, low_pairs));
    store(out + 2 * W * half + W, (vf)__builtin_shuffle(a, b, low_pairs + W / 4));
  }
#endif
}

// ln(k 2^-24) for whole numbers k in [1, 2^24]; the polynomial is a minimax fit (6e-9 relative).
NJEPA_INLINE vf log_unit(vi k) {
  const vf value = __builtin_convertvector(k, vf);
  // Mantissa in [sqrt(1/2), sqrt(2)): exact at 1, so that no digits are lost where u is near 1.
  const vi bits = (vi)value - 0x3f3504f3;
  const vi exponent = (bits >> 23) - 24;
  const vf f = (vf)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  vf p = splat(-0x1.41eb14p-4f);
  p = p * f + 0x1.07d060p-3f;
  p = p * f - 0x1.0ce0c6p-3f;
  p = p * f + 0x1.226e62p-3f;
  p = p * f - 0x1.547886p-3f;
  p = p * f + 0x1.99a596p-3f;
  p = p * f - 0x1.000220p-2f;
  p = p * f + 0x1.55554ap-2f;
  const vf e = __builtin_convertvector(exponent, vf);
  // ln 2 in two parts; the first has 12 zero bits at the end, so its product is exact.
  const vf tail = p * f * f * f - 0.5f * f * f + e * -2.12194440e-4f;
  return e * 0.693359375f + (f + tail);
}

// Sine and cosine of an angle in [0, 2 pi].
NJEPA_INLINE void sin_cos(vf angle, vf& sine, vf& cosine) {
  const vi quadrant = __builtin_convertvector(angle * 0.636619772f + 0.5f, vi);
  const vf q = __builtin_convertvector(quadrant, vf);
  // pi/2 in three parts of few bits: the first two products are exact.
  vf r = angle - q * 0x1.92p+0f;
  r = r - q * 0x1.fb4p-12f;
  r = r - q * 0x1.4442d2p-24f;
  const vf z = r * r;
  const vf s = r +
      r * z * (((2.7182741e-06f * z - 0.0001983933f) * z + 0.008333329f) * z - 0.16666667f);
  const vf c = 1.0f - 0.5f * z +
      z * z * (((-2.7209887e-07f * z + 2.4799516e-05f) * z - 0.0013888883f) * z + 0.041666668f);
  const vi odd = -(quadrant & 1);
  const vf a = select(odd, c, s), b = select(odd, s, c);
  // Signs: sine flips in quadrants 2 and 3, cosine in 1 and 2.
  sine = (vf)((vi)a ^ ((quadrant & 2) << 30));
  cosine = (vf)((vi)b ^ (((quadrant + 1) & 2) << 30));
}

NJEPA_INLINE void box_muller(vu a, vu b, vf& first, vf& second) {
  const vf radius = vsqrt(-2.0f * log_unit((vi)(a >> 8) + 1));
  // Two roundings, as in the reference: 2^-24 is exact, then times 2 pi.
  const vf angle = __builtin_convertvector((vi)(b >> 8), vf) * 0x1p-24f * 6.28318548f;
  vf sine, cosine;
  sin_cos(angle, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// Normals 0 .. d-1 of a token into `out`, which has room for round_up(d, 64).
inline void normals(uint32_t seed, uint32_t step, uint32_t sample, uint32_t block, uint32_t patch,
                    int64_t d, float* out) {
  vw lane;
  for (int i = 0; i < W / 2; ++i) lane[i] = i;
  for (int64_t first = 0; first < d; first += 4 * W) {
    const vw group = lane + static_cast<uint64_t>(first / 4);
    const vw zero{};
    const Words start = {zero + sample, zero + block, zero + patch, group};
    const Words low = philox(start, seed, step);
    const Words high = philox({start.x0, start.x1, start.x2, group + W / 2}, seed, step);
    vf n[4];
    box_muller(join(low.x0, high.x0), join(low.x1, high.x1), n[0], n[1]);
    box_muller(join(low.x2, high.x2), join(low.x3, high.x3), n[2], n[3]);
    store_interleaved(n, out + first);
  }
}

}  // namespace njepa::NJEPA_ISA
