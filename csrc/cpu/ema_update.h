// ema_update_.
#pragma once

#include "simd.h"

namespace njepa::NJEPA_ISA {

// A block of `count` elements: t <- m t + (1-m) s.
inline void ema(const Ema& e) {
  constexpr int64_t step = 1024;
  float scratch[step];
  for (int64_t first = 0; first < e.count; first += step) {
    const int64_t n = e.count - first < step ? e.count - first : step;
    const float* source = read(e.source, e.type, first, n, scratch);
    float* target = e.target + first;
    each_vector(n, [&](int64_t i, int lanes) {
      // Rounded as target.mul_(m).add_(source, alpha=1-m) is where there is an FMA.
      const vf kept = rounded(e.momentum * load(target + i, lanes));
      const vf mean = kept + e.rest * load(source + i, lanes);
      store(target + i, mean, lanes);
      if (e.shadow) {
        const vh bits = to_bf16(mean);
        __builtin_memcpy(e.shadow + first + i, &bits, lanes == W ? sizeof bits : 2 * lanes);
      }
    });
  }
}

}  // namespace njepa::NJEPA_ISA
