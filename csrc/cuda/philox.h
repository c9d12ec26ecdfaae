// The noise stream: Philox4x32-10 and Box-Muller, as njepa_kernels/_runtime/philox.py defines it.
// The CPU library has its own (csrc/cpu/philox.h), written for vectors of counters.
#pragma once

#include "device.h"

namespace njepa::cuda {

__device__ inline void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c[0]) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Sine and cosine of an angle in [0, 2 pi], to 1e-7. The runtime's own reduce any angle, through
// local memory.
__device__ inline void sin_cos(float angle, float& sine, float& cosine) {
  const int quadrant = static_cast<int>(angle * 0.636619772f + 0.5f);
  const float q = static_cast<float>(quadrant);
  // pi/2 in three parts of few bits: the first two products are exact.
  float r = angle - q * 0x1.92p+0f;
  r = r - q * 0x1.fb4p-12f;
  r = r - q * 0x1.4442d2p-24f;
  const float z = r * r;
  const float s = r +
      r * z * (((2.7182741e-06f * z - 0.0001983933f) * z + 0.008333329f) * z - 0.16666667f);
  const float c = 1.0f - 0.5f * z +
      z * z * (((-2.7209887e-07f * z + 2.4799516e-05f) * z - 0.0013888883f) * z + 0.041666668f);
  const bool odd = quadrant & 1;
  const float a = odd ? c : s, b = odd ? s : c;
  // Sine is negative in quadrants 2 and 3, cosine in 1 and 2.
  sine = quadrant & 2 ? -a : a;
  cosine = (quadrant + 1) & 2 ? -b : b;
}

__device__ inline void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const float u = static_cast<float>((a >> 8) + 1) * 0x1p-24f;
  const float radius = sqrtf(-2.0f * logf(u));
  // Two roundings, as in the reference: 2^-24 is exact, then times 2 pi.
  const float angle = static_cast<float>(b >> 8) * 0x1p-24f * 6.28318548f;
  float sine, cosine;
  sin_cos(angle, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// Normals column .. column + kCount - 1 of a token; both are multiples of 4.
template <int kCount>
__device__ inline void normals(const Noise& noise, int64_t sample, uint32_t block, int64_t patch,
                               uint32_t column, float (&out)[kCount]) {
  const uint32_t step = noise.step_at ? static_cast<uint32_t>(read(noise.step_at)) : noise.step;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    uint32_t words[4] = {static_cast<uint32_t>(sample), noise.shared ? 0 : block,
                         static_cast<uint32_t>(patch), (column + i) / 4};
    philox(words, noise.seed, step);
    box_muller(words[0], words[1], out[i], out[i + 1]);
    box_muller(words[2], words[3], out[i + 2], out[i + 3]);
  }
}

}  // namespace njepa::cuda
