// jepa_loss, its gradients in the same pass.
#pragma once

#include "simd.h"

namespace njepa::NJEPA_ISA {

// The sum of s(x - y) over a row with y = (h - mean) * inverse, and in `out`, unless null,
// slope * s'(x - y) + pull * (x - other).
NJEPA_INLINE float loss_of(const JepaLoss& j, const float* h, float mean, float inverse,
                           const float* x, const float* other, float slope, float pull,
                           float* out) {
  const float inverse_beta = j.beta > 0.0f ? 1.0f / j.beta : 0.0f;
  return sum_over(j.D, [&](int64_t i, int lanes) {
    const vf value = load(x + i, lanes);
    const vf e = value - (load(h + i, lanes) - mean) * inverse;
    const vf a = vabs(e);
    const vf line = a - 0.5f * j.beta, parabola = 0.5f * e * e * inverse_beta;
    if (out) {
      vf g = e * inverse_beta;  // beta = 0: zero where e is, the sign elsewhere; NaN stays NaN
      g = select((vi)(e > j.beta), splat(1.0f), g);
      g = select((vi)(e < -j.beta), splat(-1.0f), g);
      g *= slope;
      if (pull != 0.0f) g += pull * (value - load(other + i, lanes));
      store(out + i, g, lanes);
    }
    return keep(select((vi)(a < j.beta), parabola, line), lanes);
  });
}

inline void jepa_loss(const JepaLoss& j, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = j.D, padded = round_up(D, kBlock);
  const float width = static_cast<float>(D);
  float* slopes = scratch + 3 * padded;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t t = row % j.Kt, b = row / j.Kt % j.B, m = row / j.Kt / j.B;
    const int64_t target = (b * j.M + m) * j.Kt + t, at = row * D;
    const float* h = read(j.h, j.h_type, (b * j.N + j.target_idx[target]) * D, D, scratch);
    const float* pred = read(j.pred, j.type, at, D, scratch + padded);
    const float* noised = j.noised ? read(j.noised, j.type, at, D, scratch + 2 * padded) : nullptr;

    const float mean =
        sum_over(D, [&](int64_t i, int lanes) { return load(h + i, lanes); }) / width;
    const float variance = sum_over(D, [&](int64_t i, int lanes) {
      const vf centred = keep(load(h + i, lanes) - mean, lanes);
      return centred * centred;
    }) / width;
    const float inverse = 1.0f / __builtin_sqrtf(variance + j.eps);

    float* means = j.means + (noised ? 3 * row : row);
    float* out = j.dpred ? writable(j.dpred, j.type, at, slopes) : nullptr;
    means[0] =
        loss_of(j, h, mean, inverse, pred, noised, j.slope_pred, j.pull_pred, out) / width;
    if (out) finish(j.dpred, j.type, at, D, slopes);
    if (!noised) continue;
    out = j.dnoised ? writable(j.dnoised, j.type, at, slopes) : nullptr;
    means[1] =
        loss_of(j, h, mean, inverse, noised, pred, j.slope_noised, j.pull_noised, out) / width;
    if (out) finish(j.dnoised, j.type, at, D, slopes);
    means[2] = sum_over(D, [&](int64_t i, int lanes) {
      const vf apart = load(noised + i, lanes) - load(pred + i, lanes);
      return apart * apart;
    }) / width;
  }
}

// Elements [begin, end): out = factor * in.
inline void scale(const Scale& s, int64_t begin, int64_t end) {
  constexpr int64_t step = 1024;
  float scratch[step];
  for (int64_t first = begin; first < end; first += step) {
    const int64_t n = end - first < step ? end - first : step;
    const float* in = read(s.in, s.type, first, n, scratch);
    float* out = writable(s.out, s.type, first, scratch);
    each_vector(n, [&](int64_t i, int lanes) {
      store(out + i, s.factor * load(in + i, lanes), lanes);
    });
    finish(s.out, s.type, first, n, scratch);
  }
}

}  // namespace njepa::NJEPA_ISA
