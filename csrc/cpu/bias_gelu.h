// bias_gelu, and the exponential that it needs.
#pragma once

#include "simd.h"

namespace njepa::NJEPA_ISA {

// e^x for x <= 0: 2^n e^r with |r| <= ln(2)/2, a minimax fit (3e-9); zero where e^x is no normal.
NJEPA_INLINE vf exp_down(vf x) {
  // Adding 1.5 * 2^23 rounds to a whole number.
  const vf n = (x * 0x1.715476p+0f + 0x1.8p23f) - 0x1.8p23f;
  // ln 2 in two parts; the first has 12 zero bits at the end, so its product is exact.
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(0.0013950602f);
  p = p * r + 0.0083689531f;
  p = p * r + 0.041666206f;
  p = p * r + 0.16666518f;
  p = p * r + 0.5f;
  const vf power = p * r * r + r + 1.0f;
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return select((vi)(x < -87.0f), splat(0.0f), power * (vf)exponent);
}

struct Gelu {
  vf factor;  // g in GELU(u) = u g
  vf slope;   // the derivative of u g
};

// u Phi(u). Phi(-|u|) = exp(-u^2 / 2) t p(t), t = 1 / (1 + .3 |u|): a minimax fit, 1.5e-7 relative.
NJEPA_INLINE Gelu gelu_erf(vf u) {
  const vf e = exp_down(-0.5f * u * u);
  const vf t = 1.0f / (1.0f + 0.3f * vabs(u));
  vf p = splat(0.03567488119006157f);
  p = p * t - 0.15720349550247192f;
  p = p * t + 0.20635415613651276f;
  p = p * t - 0.053684208542108536f;
  p = p * t + 0.12856189906597137f;
  p = p * t + 0.09991341829299927f;
  p = p * t + 0.12075397372245789f;
  p = p * t + 0.11962930113077164f;
  const vf low = p * t * e;
  const vf factor = select((vi)(u < 0.0f), low, 1.0f - low);
  return {factor, factor + u * e * 0.3989422804014327f};
}

// (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), from the exponential that cannot overflow.
NJEPA_INLINE Gelu gelu_tanh(vf u) {
  const vf square = u * u, twice = 1.5957691216057308f * (u + 0.044715f * square * u);
  const vf e = exp_down(-vabs(twice));
  const vf low = e / (1.0f + e);
  const vf factor = select((vi)(twice < 0.0f), low, 1.0f - low);
  const vf rise = 1.5957691216057308f * (1.0f + 0.134145f * square);
  return {factor, factor + u * (low * (1.0f - low)) * rise};
}

// So many columns at a time, which stay in the first cache beside their scratch.
inline constexpr int64_t kColumns = 1024;

template <class F>
NJEPA_INLINE void each_columns(int64_t D, F f) {
  for (int64_t first = 0; first < D; first += kColumns)
    f(first, D - first < kColumns ? D - first : kColumns);
}

template <Gelu gelu(vf)>
NJEPA_INLINE void gelu_rows(const BiasGelu& b, int64_t begin, int64_t end) {
  float in[kColumns], scratch[kColumns];
  for (int64_t row = begin; row < end; ++row) {
    each_columns(b.D, [&](int64_t first, int64_t n) {
      const int64_t at = row * b.D + first;
      const float* x = read(b.x, b.type, at, n, in);
      const float* bias = b.bias + first;
      float* out = writable(b.out, b.type, at, scratch);
      each_vector(n, [&](int64_t i, int lanes) {
        const vf u = load(x + i, lanes) + load(bias + i, lanes);
        store(out + i, u * gelu(u).factor, lanes);
      });
      finish(b.out, b.type, at, n, out);
    });
  }
}

inline void bias_gelu(const BiasGelu& b, int64_t begin, int64_t end) {
  b.tanh ? gelu_rows<gelu_tanh>(b, begin, end) : gelu_rows<gelu_erf>(b, begin, end);
}

// Blocks of kSumRows rows: their gradients, and the sums of these over the rows.
template <Gelu gelu(vf)>
NJEPA_INLINE void gelu_backward_blocks(const BiasGeluBackward& b, int64_t begin, int64_t end) {
  float grads[kColumns], in[kColumns], scratch[kColumns];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first_row = block * kSumRows;
    const int64_t last_row = first_row + kSumRows < b.rows ? first_row + kSumRows : b.rows;
    each_columns(b.D, [&](int64_t first, int64_t n) {
      const float* bias = b.bias + first;
      float* sums = b.sums + block * b.D + first;
      __builtin_memset(sums, 0, n * sizeof(float));
      for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t at = row * b.D + first;
        const float* grad = read(b.grad, b.type, at, n, grads);
        const float* x = read(b.x, b.type, at, n, in);
        float* out = writable(b.dx, b.type, at, scratch);
        each_vector(n, [&](int64_t i, int lanes) {
          const vf u = load(x + i, lanes) + load(bias + i, lanes);
          const vf du = load(grad + i, lanes) * gelu(u).slope;
          store(out + i, du, lanes);
          store(sums + i, load(sums + i, lanes) + du, lanes);
        });
        finish(b.dx, b.type, at, n, out);
      }
    });
  }
}

inline void bias_gelu_backward(const BiasGeluBackward& b, int64_t begin, int64_t end) {
  b.tanh ? gelu_backward_blocks<gelu_tanh>(b, begin, end)
         : gelu_backward_blocks<gelu_erf>(b, begin, end);
}

}  // namespace njepa::NJEPA_ISA
