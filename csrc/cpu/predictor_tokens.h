// predictor_tokens: rows by index and noise, sums in fp32.
#pragma once

#include "philox.h"

namespace njepa::NJEPA_ISA {

NJEPA_INLINE void token_normals(
    const Noise& noise, int64_t b, int64_t m, int64_t patch, int64_t d, float* out) {
  const uint32_t step = noise.step_at ? static_cast<uint32_t>(*noise.step_at) : noise.step;
  normals(noise.seed, step, static_cast<uint32_t>(noise.sample_ids[b]),
          noise.shared ? 0 : static_cast<uint32_t>(m), static_cast<uint32_t>(patch), d, out);
}

inline void predictor_forward(
    const PredictorForward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t tokens = p.Kc + p.Kt, D = p.D;
  float* draw = scratch + round_up(D, kBlock);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row % tokens, b = row / tokens % p.B, m = row / tokens / p.B;
    float* out = writable(p.out, p.type, row * D, scratch);
    if (token < p.Kc) {
      const int64_t k = b * p.Kc + token;
      const float* context = read(p.context, p.type, k * D, D, scratch);
      const float* pos = p.pos + p.context_idx[k] * D;
      each_vector(D, [&](int64_t i, int lanes) {
        store(out + i, load(context + i, lanes) + load(pos + i, lanes), lanes);
      });
    } else {
      const int64_t target = (b * p.M + m) * p.Kt + token - p.Kc, patch = p.target_idx[target];
      const float* pos = p.pos + patch * D;
      const float s = p.sigma ? p.sigma[b * p.M + m] : 0.0f;
      if (s == 0.0f) {
        each_vector(D, [&](int64_t i, int lanes) {
          store(out + i, load(p.mask_token + i, lanes) + load(pos + i, lanes), lanes);
        });
      } else {
        token_normals(p.noise, b, m, patch, D, draw);
        each_vector(D, [&](int64_t i, int lanes) {
          const vf noised = load(pos + i, lanes) + s * load(draw + i);
          store(out + i, load(p.mask_token + i, lanes) + noised, lanes);
        });
      }
    }
    finish(p.out, p.type, row * D, D, scratch);
  }
}

// Rows b*Kc + k of dcontext: the sum over the blocks.
inline void predictor_backward_context(
    const PredictorBackward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t tokens = p.Kc + p.Kt, D = p.D;
  float* wide = scratch + round_up(D, kBlock);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.Kc, k = row % p.Kc;
    float* out = writable(p.dcontext, p.type, row * D, scratch);
    for (int64_t m = 0; m < p.M; ++m)
      add_row(out, read(p.grad, p.type, ((m * p.B + b) * tokens + k) * D, D, wide), D, m == 0);
    if (p.M == 0) __builtin_memset(out, 0, D * sizeof(float));
    finish(p.dcontext, p.type, row * D, D, scratch);
  }
}

// Blocks of mask_rows targets (b*M+m)*Kt + t: their sum for the mask token, and dsigma.
inline void predictor_backward_targets(
    const PredictorBackward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t tokens = p.Kc + p.Kt, D = p.D, targets = p.B * p.M * p.Kt;
  float* draw = scratch + round_up(D, kBlock);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * p.mask_rows;
    const int64_t last = first + p.mask_rows < targets ? first + p.mask_rows : targets;
    float* sums = p.dmask_blocks + block * D;
    for (int64_t target = first; target < last; ++target) {
      const int64_t t = target % p.Kt, m = target / p.Kt % p.M, b = target / p.Kt / p.M;
      const int64_t row = (m * p.B + b) * tokens + p.Kc + t;
      const float* grad = read(p.grad, p.type, row * D, D, scratch);
      add_row(sums, grad, D, target == first);
      if (!p.dsigma) continue;
      token_normals(p.noise, b, m, p.target_idx[target], D, draw);
      p.dsigma[target] = sum_over(
          D, [&](int64_t i, int lanes) { return load(grad + i, lanes) * load(draw + i); });
    }
  }
}

inline void predictor_backward_pos(
    const PredictorBackward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t tokens = p.Kc + p.Kt, D = p.D, kept = p.B * p.Kc;
  for (int64_t patch = begin; patch < end; ++patch) {
    float* out = p.dpos + patch * D;
    __builtin_memset(out, 0, D * sizeof(float));
    for (int64_t e = p.inverse.start[patch]; e < p.inverse.start[patch + 1]; ++e) {
      const int64_t entry = p.inverse.order[e];
      if (entry < kept) {
        const int64_t b = entry / p.Kc, k = entry % p.Kc;
        for (int64_t m = 0; m < p.M; ++m) {
          const int64_t row = (m * p.B + b) * tokens + k;
          add_row(out, read(p.grad, p.type, row * D, D, scratch), D, false);
        }
      } else {
        const int64_t target = entry - kept;
        const int64_t t = target % p.Kt, m = target / p.Kt % p.M, b = target / p.Kt / p.M;
        const int64_t row = (m * p.B + b) * tokens + p.Kc + t;
        add_row(out, read(p.grad, p.type, row * D, D, scratch), D, false);
      }
    }
  }
}

}  // namespace njepa::NJEPA_ISA
