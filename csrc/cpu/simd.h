// Vectors of floats in GCC's vector extension (also understood by clang), and rows of any type.
#pragma once

#include <cstdint>

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace njepa::NJEPA_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

#define NJEPA_INLINE inline __attribute__((always_inline))

NJEPA_INLINE vf splat(float value) { return value - vf{}; }

NJEPA_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

NJEPA_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

NJEPA_INLINE float sum(vf v) {
  float lane[W];
  store(lane, v);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
}

NJEPA_INLINE vf select(vi condition, vf yes, vf no) {
  return (vf)((condition & (vi)yes) | (~condition & (vi)no));
}

NJEPA_INLINE vf vabs(vf v) { return (vf)((vi)v & 0x7fffffff); }

// Keeps a product from becoming part of a fused multiply-add: it is rounded on its own.
NJEPA_INLINE vf rounded(vf v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__SSE2__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

NJEPA_INLINE vf vsqrt(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Calls f(offset, lanes) over [0, n): lanes is W except in the last call.
template <class F>
NJEPA_INLINE void each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, static_cast<int>(n - i));
}

// The first `lanes` floats, zeros behind them; nothing is read or written beyond.
NJEPA_INLINE vf load(const float* p, int lanes) {
  if (lanes == W) return load(p);
  vf v{};
  for (int i = 0; i < lanes; ++i) v[i] = p[i];
  return v;
}

NJEPA_INLINE void store(float* p, vf v, int lanes) {
  if (lanes == W) return store(p, v);
  for (int i = 0; i < lanes; ++i) p[i] = v[i];
}

// The sum of f(offset, lanes) over [0, n), eight vectors at a time by pairs: the rounding error
// stays that of a short sum, and the additions need not wait for one another.
template <class F>
NJEPA_INLINE float sum_over(int64_t n, F f) {
  vf total{};
  int64_t i = 0;
  for (; i + 8 * W <= n; i += 8 * W) {
    const vf a = f(i, W) + f(i + W, W), b = f(i + 2 * W, W) + f(i + 3 * W, W);
    const vf c = f(i + 4 * W, W) + f(i + 5 * W, W), d = f(i + 6 * W, W) + f(i + 7 * W, W);
    total += (a + b) + (c + d);
  }
  for (; i + W <= n; i += W) total += f(i, W);
  if (i < n) total += f(i, static_cast<int>(n - i));
  return sum(total);
}

// Zeros in the lanes that are not among the first `lanes`.
NJEPA_INLINE vf keep(vf v, int lanes) {
  for (int i = lanes; i < W; ++i) v[i] = 0.0f;
  return v;
}

NJEPA_INLINE vf from_bf16(vh bits) { return (vf)(__builtin_convertvector(bits, vu) << 16); }

// To nearest, ties to even; any NaN becomes the quiet one.
NJEPA_INLINE vh to_bf16(vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu nan = (vu)((bits & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
}

#if !defined(__AVX512F__) && !defined(__F16C__)
NJEPA_INLINE float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
  float value;
  if (rest < 0x400) {
    value = static_cast<float>(rest) * 0x1p-24f;
  } else {
    // Infinity and NaN keep all exponent bits set.
    const uint32_t wide = (rest << 13) + (rest >= 0x7c00 ? 0x70000000u : 0x38000000u);
    __builtin_memcpy(&value, &wide, 4);
  }
  uint32_t out;
  __builtin_memcpy(&out, &value, 4);
  out |= sign;
  __builtin_memcpy(&value, &out, 4);
  return value;
}

NJEPA_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or beyond
  if (bits < 0x38800000) {                       // subnormal: let the addition round
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    const float shifted = magnitude + 0.5f;
    uint32_t low;
    __builtin_memcpy(&low, &shifted, 4);
    return sign | static_cast<uint16_t>(low - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
}
#endif

NJEPA_INLINE vf from_f16(vh bits) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)bits);
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = half_to_float(bits[i]);
  return v;
#endif
}

NJEPA_INLINE vh to_f16(vf v) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  vh bits;
  for (int i = 0; i < W; ++i) bits[i] = float_to_half(v[i]);
  return bits;
#endif
}

template <class Convert>
NJEPA_INLINE void widen(const uint16_t* source, int64_t n, float* out, Convert convert) {
  each_vector(n, [&](int64_t i, int lanes) {
    vh bits{};
    __builtin_memcpy(&bits, source + i, lanes == W ? sizeof bits : 2 * lanes);
    store(out + i, convert(bits), lanes);
  });
}

template <class Convert>
NJEPA_INLINE void narrow(const float* source, int64_t n, uint16_t* out, Convert convert) {
  each_vector(n, [&](int64_t i, int lanes) {
    const vh bits = convert(load(source + i, lanes));
    __builtin_memcpy(out + i, &bits, lanes == W ? sizeof bits : 2 * lanes);
  });
}

NJEPA_INLINE const void* at(const void* base, Type type, int64_t element) {
  return static_cast<const char*>(base) + element * size_of(type);
}

NJEPA_INLINE void* at(void* base, Type type, int64_t element) {
  return static_cast<char*>(base) + element * size_of(type);
}

// Elements [first, first + n) as floats: in place if they are, else converted into `scratch`.
NJEPA_INLINE const float* read(
    const void* base, Type type, int64_t first, int64_t n, float* scratch) {
  const void* source = at(base, type, first);
  if (type == Type::f32) return static_cast<const float*>(source);
  if (type == Type::bf16)
    widen(static_cast<const uint16_t*>(source), n, scratch, [](vh v) { return from_bf16(v); });
  else
    widen(static_cast<const uint16_t*>(source), n, scratch, [](vh v) { return from_f16(v); });
  return scratch;
}

// Where to compute the floats of elements [first, ...): the elements themselves or `scratch`.
NJEPA_INLINE float* writable(void* base, Type type, int64_t first, float* scratch) {
  return type == Type::f32 ? static_cast<float*>(at(base, type, first)) : scratch;
}

// Completes a write through writable().
NJEPA_INLINE void finish(void* base, Type type, int64_t first, int64_t n, const float* scratch) {
  void* out = at(base, type, first);
  if (type == Type::bf16)
    narrow(scratch, n, static_cast<uint16_t*>(out), [](vf v) { return to_bf16(v); });
  else if (type == Type::f16)
    narrow(scratch, n, static_cast<uint16_t*>(out), [](vf v) { return to_f16(v); });
}

// out += row, or out = row where it is the first.
NJEPA_INLINE void add_row(float* out, const float* row, int64_t n, bool first) {
  if (first) {
    __builtin_memcpy(out, row, n * sizeof(float));
  } else {
    each_vector(n, [&](int64_t i, int lanes) {
      store(out + i, load(out + i, lanes) + load(row + i, lanes), lanes);
    });
  }
}

}  // namespace njepa::NJEPA_ISA
