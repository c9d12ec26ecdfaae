// add_layer_norm: rows that are added, normalised, and scaled; sums in fp32.
#pragma once

#include "simd.h"

namespace njepa::NJEPA_ISA {

inline void add_layer_norm(const AddLayerNorm& n, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = n.D, padded = round_up(D, kBlock);
  const float width = static_cast<float>(D);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * D;
    const float* total = read(n.x, n.x_type, at, D, scratch);
    if (n.residual) {
      const float* residual = read(n.residual, n.type, at, D, scratch + padded);
      float* out = writable(n.total, n.type, at, scratch + 2 * padded);
      each_vector(D, [&](int64_t i, int lanes) {
        store(out + i, load(total + i, lanes) + load(residual + i, lanes), lanes);
      });
      finish(n.total, n.type, at, D, out);
      // Normalised is what is kept, rounded, so that the backward finds the same row.
      total = read(n.total, n.type, at, D, scratch + 2 * padded);
    }
    const float mean =
        sum_over(D, [&](int64_t i, int lanes) { return load(total + i, lanes); }) / width;
    const float variance = sum_over(D, [&](int64_t i, int lanes) {
      const vf centred = keep(load(total + i, lanes) - mean, lanes);
      return centred * centred;
    }) / width;
    const float inverse = 1.0f / __builtin_sqrtf(variance + n.eps);
    n.means[row] = mean;
    n.inverses[row] = inverse;
    float* out = writable(n.out, n.out_type, at, scratch + 3 * padded);
    each_vector(D, [&](int64_t i, int lanes) {
      const vf normed = (load(total + i, lanes) - mean) * inverse;
      store(out + i, normed * load(n.weight + i, lanes) + load(n.bias + i, lanes), lanes);
    });
    finish(n.out, n.out_type, at, D, out);
  }
}

// Blocks of sum_rows rows: their gradients, and their sums for weight and bias.
inline void add_layer_norm_backward(
    const AddLayerNormBackward& n, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = n.D, padded = round_up(D, kBlock);
  const float width = static_cast<float>(D);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kSumRows;
    const int64_t last = first + kSumRows < n.rows ? first + kSumRows : n.rows;
    float* sums = n.sums + block * 2 * D;
    float *dweight = scratch + 4 * padded, *dbias = dweight + padded;
    __builtin_memset(sums, 0, 2 * D * sizeof(float));
    for (int64_t row = first; row < last; ++row) {
      if ((row - first) % kFoldRows == 0) __builtin_memset(dweight, 0, 2 * padded * sizeof(float));
      const int64_t at = row * D;
      const float* grad = read(n.grad, n.grad_type, at, D, scratch);
      const float* total = read(n.total, n.type, at, D, scratch + padded);
      const float* through =
          n.grad_total ? read(n.grad_total, n.type, at, D, scratch + 2 * padded) : nullptr;
      const float mean = n.means[row], inverse = n.inverses[row];
      const float level = sum_over(D, [&](int64_t i, int lanes) {
        return load(grad + i, lanes) * load(n.weight + i, lanes);
      }) / width;
      const float along = sum_over(D, [&](int64_t i, int lanes) {
        const vf normed = (load(total + i, lanes) - mean) * inverse;
        return keep(load(grad + i, lanes) * load(n.weight + i, lanes) * normed, lanes);
      }) / width;
      // Into the result that is fp32, if one is, and from there into the other.
      float* out = scratch + 3 * padded;
      if (n.dresidual) out = writable(n.dresidual, n.type, at, out);
      out = writable(n.dx, n.x_type, at, out);
      each_vector(D, [&](int64_t i, int lanes) {
        const vf g = load(grad + i, lanes), normed = (load(total + i, lanes) - mean) * inverse;
        vf d = (g * load(n.weight + i, lanes) - level - normed * along) * inverse;
        if (through) d += load(through + i, lanes);
        store(out + i, d, lanes);
        store(dweight + i, load(dweight + i, lanes) + g * normed, lanes);
        store(dbias + i, load(dbias + i, lanes) + g, lanes);
      });
      finish(n.dx, n.x_type, at, D, out);
      if (n.dresidual) finish(n.dresidual, n.type, at, D, out);
      // Sums of few rows are added up: a sum row by row would lose twice as much to rounding.
      if ((row - first) % kFoldRows == kFoldRows - 1 || row == last - 1) {
        add_row(sums, dweight, D, false);
        add_row(sums + D, dbias, D, false);
      }
    }
  }
}

}  // namespace njepa::NJEPA_ISA
