// gather_tokens: rows by index, sums in fp32.
#pragma once

#include "simd.h"

namespace njepa::NJEPA_ISA {

inline void gather_forward(const GatherForward& g, int64_t begin, int64_t end, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = g.idx[row], source = (row / g.K * g.N + n) * g.D;
    if (!g.pos) {
      __builtin_memcpy(at(g.out, g.type, row * g.D), at(g.x, g.type, source),
                       g.D * size_of(g.type));
      continue;
    }
    const float* x = read(g.x, g.type, source, g.D, scratch);
    const float* pos = g.pos + n * g.D;
    float* out = writable(g.out, g.type, row * g.D, scratch);
    each_vector(g.D, [&](int64_t i, int lanes) {
      store(out + i, load(x + i, lanes) + load(pos + i, lanes), lanes);
    });
    finish(g.out, g.type, row * g.D, g.D, scratch);
  }
}

inline void gather_backward(const GatherBackward& g, int64_t begin, int64_t end, float* scratch) {
  const int64_t bytes = g.D * size_of(g.type);
  float* wide = scratch + round_up(g.D, kBlock);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = g.inverse.start[row], last = g.inverse.start[row + 1];
    void* dx = at(g.dx, g.type, row * g.D);
    if (first == last) {
      __builtin_memset(dx, 0, bytes);
    } else if (first + 1 == last) {
      __builtin_memcpy(dx, at(g.grad, g.type, g.inverse.order[first] * g.D), bytes);
    } else {
      float* out = writable(g.dx, g.type, row * g.D, scratch);
      for (int64_t e = first; e < last; ++e)
        add_row(out, read(g.grad, g.type, g.inverse.order[e] * g.D, g.D, wide), g.D, e == first);
      finish(g.dx, g.type, row * g.D, g.D, scratch);
    }
  }
}

inline void gather_backward_pos(
    const GatherBackward& g, int64_t begin, int64_t end, float* scratch) {
  for (int64_t n = begin; n < end; ++n) {
    float* out = g.dpos + n * g.D;
    __builtin_memset(out, 0, g.D * sizeof(float));
    for (int64_t b = 0; b < g.B; ++b)
      for (int64_t e = g.inverse.start[b * g.N + n]; e < g.inverse.start[b * g.N + n + 1]; ++e)
        add_row(out, read(g.grad, g.type, g.inverse.order[e] * g.D, g.D, scratch), g.D, false);
  }
}

}  // namespace njepa::NJEPA_ISA
