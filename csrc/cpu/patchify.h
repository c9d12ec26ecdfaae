// patchify: bytes to normalised patches, channel by channel.
#pragma once

#include "simd.h"

namespace njepa::NJEPA_ISA {

// The first `lanes` bytes as floats; nothing is read beyond.
NJEPA_INLINE vf load_bytes(const uint8_t* p, int lanes) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  vb bytes{};
  __builtin_memcpy(&bytes, p, lanes == W ? W : lanes);
#if defined(__AVX512F__)  // GCC's own conversion takes twice the time
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)bytes));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes)));
#else
  return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
#endif
}

#if defined(__SSSE3__)
// Where byte i of channel c lies in bytes 16 part to 16 part + 15 of 16 pixels; 0x80: elsewhere.
template <int c, int part>
NJEPA_INLINE __m128i take(__m128i bytes) {
  alignas(16) static constexpr auto places = [] {
    struct { uint8_t at[16]; } table{};
    for (int i = 0; i < 16; ++i) {
      const int byte = 3 * i + c - 16 * part;
      table.at[i] = byte >= 0 && byte < 16 ? byte : 0x80;
    }
    return table;
  }();
  return _mm_shuffle_epi8(bytes, _mm_load_si128(reinterpret_cast<const __m128i*>(places.at)));
}

template <int c>
NJEPA_INLINE void take_channel(__m128i first, __m128i second, __m128i third, uint8_t* plane) {
  const __m128i two = _mm_or_si128(take<c, 0>(first), take<c, 1>(second));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(plane), _mm_or_si128(two, take<c, 2>(third)));
}
#endif

// n pixels of three neighbouring bytes into three planes.
inline void split_channels(const uint8_t* __restrict__ pixels, int64_t n, uint8_t* __restrict__ red,
                           uint8_t* __restrict__ green, uint8_t* __restrict__ blue) {
  int64_t i = 0;
#if defined(__SSSE3__)
  for (; i + 16 <= n; i += 16) {
    const __m128i* from = reinterpret_cast<const __m128i*>(pixels + 3 * i);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2);
    take_channel<0>(a, b, c, red + i);
    take_channel<1>(a, b, c, green + i);
    take_channel<2>(a, b, c, blue + i);
  }
#endif
  for (; i < n; ++i) {
    red[i] = pixels[3 * i];
    green[i] = pixels[3 * i + 1];
    blue[i] = pixels[3 * i + 2];
  }
}

inline void patchify(const Patchify& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t side = a.side, area = side * side, length = 3 * area;
  const int64_t unit = round_up(length, kBlock);
  uint8_t* planes = reinterpret_cast<uint8_t*>(scratch + unit);
  uint8_t* pixels = reinterpret_cast<uint8_t*>(scratch + 2 * unit);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.K, patch = a.idx ? a.idx[row] : row % a.K;
    const uint8_t* corner = a.images + b * a.image + patch / a.columns * side * a.line +
        patch % a.columns * side * a.pixel;
    if (a.pixel == 1) {
      for (int64_t c = 0; c < 3; ++c)
        for (int64_t i = 0; i < side; ++i)
          __builtin_memcpy(planes + c * area + i * side, corner + c * a.channel + i * a.line, side);
    } else {
      // Lines first, so that the loop over pixels is long whatever the side.
      for (int64_t i = 0; i < side; ++i)
        __builtin_memcpy(pixels + i * 3 * side, corner + i * a.line, 3 * side);
      split_channels(pixels, area, planes, planes + area, planes + 2 * area);
    }
    float* out = writable(a.out, a.type, row * length, scratch);
    for (int64_t c = 0; c < 3; ++c) {
      const vf scale = splat(a.scale[c]), shift = splat(a.shift[c]);
      each_vector(area, [&](int64_t i, int lanes) {
        const vf x = load_bytes(planes + c * area + i, lanes);
        store(out + c * area + i, x * scale + shift, lanes);
      });
    }
    finish(a.out, a.type, row * length, length, scratch);
  }
}

}  // namespace njepa::NJEPA_ISA
