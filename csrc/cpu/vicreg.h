// vicreg: column moments in one pass, then products on the smaller side by 64 x 64 tiles.
#pragma once

#include "simd.h"

namespace njepa::NJEPA_ISA {

// Elements [first, first + count) as kBlock floats, zeros behind them.
NJEPA_INLINE const float* read_block(
    const void* base, Type type, int64_t first, int64_t count, float* scratch) {
  const float* block = read(base, type, first, count, scratch);
  if (count == kBlock) return block;
  if (block != scratch) __builtin_memcpy(scratch, block, count * sizeof(float));
  for (int64_t i = count; i < kBlock; ++i) scratch[i] = 0.0f;
  return scratch;
}

// Sums over many rows are folded every kFoldRows into a second level: the error stays small.
constexpr int64_t kFoldRows = 32;

inline void vicreg_moments(const VicregMoments& v, int64_t begin, int64_t end) {
  alignas(64) float scratch[kBlock], fold[kBlock], total[kBlock], average[kBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t j = block * kBlock, count = v.D - j < kBlock ? v.D - j : kBlock;
    double spread = 0.0, hinge = 0.0, squares = 0.0;
    for (int64_t m = 0; m < v.M; ++m) {
      float* mean = v.mean + m * v.D + j;
      __builtin_memset(total, 0, sizeof total);
      for (int64_t i0 = 0; i0 < v.n; i0 += kFoldRows) {
        __builtin_memset(fold, 0, sizeof fold);
        for (int64_t i = i0; i < v.n && i < i0 + kFoldRows; ++i) {
          const float* u = read_block(v.u, v.type, (m * v.n + i) * v.D + j, count, scratch);
          for (int64_t c = 0; c < kBlock; ++c) fold[c] += u[c];
        }
        for (int64_t c = 0; c < kBlock; ++c) total[c] += fold[c];
      }
      for (int64_t c = 0; c < count; ++c) mean[c] = total[c] / static_cast<float>(v.n);

      alignas(64) float centre[kBlock] = {};
      __builtin_memcpy(centre, mean, count * sizeof(float));
      __builtin_memset(total, 0, sizeof total);
      for (int64_t i0 = 0; i0 < v.n; i0 += kFoldRows) {
        __builtin_memset(fold, 0, sizeof fold);
        for (int64_t i = i0; i < v.n && i < i0 + kFoldRows; ++i) {
          const float* u = read_block(v.u, v.type, (m * v.n + i) * v.D + j, count, scratch);
          for (int64_t c = 0; c < kBlock; ++c) fold[c] += (u[c] - centre[c]) * (u[c] - centre[c]);
        }
        for (int64_t c = 0; c < kBlock; ++c) total[c] += fold[c];
      }
      for (int64_t c = 0; c < count; ++c) {
        const float variance = total[c] / static_cast<float>(v.n - 1);
        const float std = __builtin_sqrtf(variance + v.eps);
        v.std[m * v.D + j + c] = std;
        // Written so that a NaN gets through.
        hinge += std >= v.gamma ? 0.0f : v.gamma - std;
        squares += static_cast<double>(variance) * variance;
      }
    }
    for (int64_t i = 0; v.M > 1 && i < v.n; ++i) {
      __builtin_memset(average, 0, sizeof average);
      for (int64_t m = 0; m < v.M; ++m) {
        const float* u = read_block(v.u, v.type, (m * v.n + i) * v.D + j, count, scratch);
        for (int64_t c = 0; c < kBlock; ++c) average[c] += u[c];
      }
      for (int64_t c = 0; c < kBlock; ++c) average[c] /= static_cast<float>(v.M);
      vf row{};
      for (int64_t m = 0; m < v.M; ++m) {
        const float* u = read_block(v.u, v.type, (m * v.n + i) * v.D + j, count, scratch);
        for (int64_t c = 0; c < kBlock; c += W) {
          const vf apart = load(u + c) - load(average + c);
          row += apart * apart;
        }
      }
      spread += sum(row);
    }
    v.partial[3 * block] = spread;
    v.partial[3 * block + 1] = hinge;
    v.partial[3 * block + 2] = squares;
  }
}

// The products: panels and the micro kernel.
constexpr int64_t kPanel = 2 * W;
constexpr int64_t kRows = W == 16 ? 8 : 4;  // accumulators: kRows x 2 vectors

// Tasks: panel after panel, view after view.
inline void vicreg_pack(const VicregPack& v, int64_t begin, int64_t end) {
  const int64_t side = v.samples ? v.n : v.D, depth = v.samples ? v.D : v.n;
  const int64_t panels = (side + kPanel - 1) / kPanel;
  alignas(64) float scratch[kBlock], row[kPanel][kBlock];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t m = task / panels, first = task % panels * kPanel;
    const int64_t count = side - first < kPanel ? side - first : kPanel;
    float* out = v.packed + task * depth * kPanel;
    const float* mean = v.mean + m * v.D;
    if (!v.samples) {
      for (int64_t i = 0; i < v.n; ++i) {
        const float* u = read(v.u, v.type, (m * v.n + i) * v.D + first, count, scratch);
        for (int64_t c = 0; c < count; ++c) out[i * kPanel + c] = u[c] - mean[first + c];
        for (int64_t c = count; c < kPanel; ++c) out[i * kPanel + c] = 0.0f;
      }
      continue;
    }
    for (int64_t j = 0; j < v.D; j += kBlock) {  // transposed by way of a block in the L1 cache
      const int64_t width = v.D - j < kBlock ? v.D - j : kBlock;
      for (int64_t r = 0; r < kPanel; ++r) {
        if (r >= count) {
          __builtin_memset(row[r], 0, sizeof row[r]);
          continue;
        }
        const float* u = read(v.u, v.type, (m * v.n + first + r) * v.D + j, width, scratch);
        for (int64_t c = 0; c < width; ++c) row[r][c] = u[c] - mean[j + c];
      }
      for (int64_t c = 0; c < width; ++c)
        for (int64_t r = 0; r < kPanel; ++r) out[(j + c) * kPanel + r] = row[r][c];
    }
  }
}

// tile[r][0..kPanel) += sum_k a[k][r] b[k][.], r < kRows; a and b are panels of `depth` steps.
NJEPA_INLINE void multiply_panels(const float* a, const float* b, int64_t depth, float* tile) {
  vf sums[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const vf b0 = load(b + k * kPanel), b1 = load(b + k * kPanel + W);
    for (int r = 0; r < kRows; ++r) {
      const vf scale = splat(a[k * kPanel + r]);
      sums[r][0] += scale * b0;
      sums[r][1] += scale * b1;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    store(tile + r * kBlock, load(tile + r * kBlock) + sums[r][0]);
    store(tile + r * kBlock + W, load(tile + r * kBlock + W) + sums[r][1]);
  }
}

// tile [kBlock][kBlock] = A^T B for the panels [a_first, ...) and [b_first, ...) of two operands.
inline void multiply_tile(const float* a, int64_t a_first, int64_t a_panels, const float* b,
                          int64_t b_first, int64_t b_panels, int64_t depth, float* tile) {
  constexpr int64_t per_tile = kBlock / kPanel;
  __builtin_memset(tile, 0, kBlock * kBlock * sizeof(float));
  for (int64_t k = 0; k < depth; k += kFold) {
    const int64_t steps = depth - k < kFold ? depth - k : kFold;
    for (int64_t q = 0; q < per_tile && b_first + q < b_panels; ++q) {
      const float* right = b + ((b_first + q) * depth + k) * kPanel;
      for (int64_t p = 0; p < per_tile && a_first + p < a_panels; ++p) {
        const float* left = a + ((a_first + p) * depth + k) * kPanel;
        for (int64_t r = 0; r < kPanel; r += kRows)
          multiply_panels(left + r, right, steps, tile + (p * kPanel + r) * kBlock + q * kPanel);
      }
    }
  }
}

// Tasks: view, then the tiles (i <= j) column after column: task = j (j + 1) / 2 + i.
inline void gram(const Gram& g, int64_t begin, int64_t end) {
  constexpr int64_t per_tile = kBlock / kPanel;
  const int64_t panels = (g.side + kPanel - 1) / kPanel;
  const int64_t tiles = (g.side + kBlock - 1) / kBlock, per_view = tiles * (tiles + 1) / 2;
  alignas(64) float tile[kBlock * kBlock];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t m = task / per_view;
    int64_t tj = 0, ti = task % per_view;
    while (ti > tj) ti -= ++tj;
    const float* packed = g.packed + m * panels * g.depth * kPanel;
    multiply_tile(packed, ti * per_tile, panels, packed, tj * per_tile, panels, g.depth, tile);
    const int64_t i0 = ti * kBlock, j0 = tj * kBlock;
    const int64_t height = g.side - i0 < kBlock ? g.side - i0 : kBlock;
    const int64_t width = g.side - j0 < kBlock ? g.side - j0 : kBlock;
    if (ti == tj && !g.keep_diagonal)
      for (int64_t i = 0; i < kBlock; ++i) tile[i * kBlock + i] = 0.0f;
    if (g.squares) {
      double squares = 0.0;
      for (int64_t i = 0; i < height; ++i) {  // beyond `width` there are zeros
        vf row{};
        for (int64_t j = 0; j < kBlock; j += W) {
          const vf entry = load(tile + i * kBlock + j);
          row += entry * entry;
        }
        squares += sum(row);
      }
      g.squares[task] = ti == tj ? squares : 2.0 * squares;
    }
    if (g.packed_gram) {
      float* out = g.packed_gram + m * panels * g.side * kPanel;
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) {
          const int64_t row = i0 + i, column = j0 + j;
          const float entry = tile[i * kBlock + j];
          out[(column / kPanel * g.side + row) * kPanel + column % kPanel] = entry;
          out[(row / kPanel * g.side + column) * kPanel + row % kPanel] = entry;
        }
    }
  }
}

inline void vicreg_backward(const VicregBackward& v, int64_t begin, int64_t end) {
  constexpr int64_t per_tile = kBlock / kPanel;
  const int64_t rows = (v.n + kBlock - 1) / kBlock, columns = (v.D + kBlock - 1) / kBlock;
  const int64_t a_panels = (v.n + kPanel - 1) / kPanel, b_panels = (v.D + kPanel - 1) / kPanel;
  alignas(64) float tile[kBlock * kBlock], average[kBlock], scratch[kBlock], out[kBlock];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t m = task / (rows * columns);
    const int64_t ti = task / columns % rows, tj = task % columns;
    multiply_tile(v.a + m * v.a_view, ti * per_tile, a_panels, v.b + m * v.b_view, tj * per_tile,
                  b_panels, v.depth, tile);
    const int64_t i0 = ti * kBlock, j0 = tj * kBlock;
    const int64_t height = v.n - i0 < kBlock ? v.n - i0 : kBlock;
    const int64_t count = v.D - j0 < kBlock ? v.D - j0 : kBlock;
    const float* mean = v.mean + m * v.D + j0;
    const float* channel = v.channel + m * v.D + j0;
    for (int64_t i = 0; i < height; ++i) {
      __builtin_memset(average, 0, sizeof average);
      for (int64_t view = 0; v.M > 1 && view < v.M; ++view) {
        const float* u =
            read_block(v.u, v.type, (view * v.n + i0 + i) * v.D + j0, count, scratch);
        for (int64_t c = 0; c < kBlock; ++c) average[c] += u[c];
      }
      const int64_t first = (m * v.n + i0 + i) * v.D + j0;
      const float* u = read(v.u, v.type, first, count, scratch);
      float* du = writable(v.du, v.type, first, out);
      const float* product = tile + i * kBlock;
      const float share = 1.0f / static_cast<float>(v.M);
      for (int64_t c = 0; c < count; ++c)
        du[c] = (u[c] - mean[c]) * channel[c] + v.product * product[c] +
            (v.M > 1 ? v.spread * (u[c] - average[c] * share) : 0.0f);
      finish(v.du, v.type, first, count, out);
    }
  }
}

}  // namespace njepa::NJEPA_ISA
