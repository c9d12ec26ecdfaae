// adamw_ema_.
#pragma once

#include "simd.h"

namespace njepa::NJEPA_ISA {

// A block of `count` elements: AdamW, then the average of what it gives, then the bf16 copies.
// Rounded as torch's fused AdamW and ema_update_ round where there is an FMA.
inline void adamw_ema(const AdamwEma& a) {
  constexpr int64_t step = 1024;
  float scratch[step];
  const auto round_to = [](uint16_t* out, vf value, int lanes) {
    const vh bits = to_bf16(value);
    __builtin_memcpy(out, &bits, lanes == W ? sizeof bits : 2 * lanes);
  };
  for (int64_t first = 0; first < a.count; first += step) {
    const int64_t n = a.count - first < step ? a.count - first : step;
    const float* grad = read(a.grad, a.type, first, n, scratch);
    each_vector(n, [&](int64_t i, int lanes) {
      const int64_t at = first + i;
      const vf g = rounded(a.scale * load(grad + i, lanes));
      const vf old = load(a.exp_avg + at, lanes), change = g - old;
      // As torch.lerp: from the nearer end.
      const vf m = a.take1 < .5f ? old + a.take1 * change : g + (a.take1 - 1.0f) * change;
      const vf v = rounded(a.take2 * g) * g + rounded(a.beta2 * load(a.exp_avg_sq + at, lanes));
      const vf denominator = vsqrt(v) / a.root + a.eps;
      const vf move = rounded(a.step_size * m) / denominator;
      const vf p = rounded(a.decay * load(a.param + at, lanes)) - move;
      store(a.exp_avg + at, m, lanes);
      store(a.exp_avg_sq + at, v, lanes);
      store(a.param + at, p, lanes);
      if (a.param_low) round_to(a.param_low + at, p, lanes);
      if (a.target) {
        const vf mean = rounded(a.keep * load(a.target + at, lanes)) + a.take * p;
        store(a.target + at, mean, lanes);
        if (a.target_low) round_to(a.target_low + at, mean, lanes);
      }
    });
  }
}

}  // namespace njepa::NJEPA_ISA
