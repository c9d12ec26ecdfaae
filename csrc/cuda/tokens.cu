// predictor_tokens: forward, and the gradients of context, positions, levels and mask token.
#include "noise.h"

namespace njepa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Rows are counted in 32 bits (a 64-bit division costs 100 instructions), addresses in 64.
struct Item {
  uint32_t row, column;
};

// Threads of the grid go over groups of columns, then rows.
__device__ inline Item item_of_thread(uint32_t D) {
  const uint32_t groups = (D + kGroup - 1) / kGroup;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  return {index / groups, index % groups * kGroup};
}

dim3 grid_of_items(int64_t rows, uint32_t D) {
  return dim3(blocks_for(rows * ((D + kGroup - 1) / kGroup), kThreads));
}

// The row of `out` (and of its gradient) where token `token` of sample b and block m is.
__device__ inline int64_t output_row(const Sizes& s, uint32_t m, uint32_t b, uint32_t token) {
  return (static_cast<int64_t>(m) * s.B + b) * (s.Kc + s.Kt) + token;
}

template <class T, bool kVector>
__global__ __launch_bounds__(kThreads) void predictor_forward_kernel(
    const __grid_constant__ PredictorForward p) {
  const Sizes& s = p.size;
  const auto [row, column] = item_of_thread(s.D);
  const uint32_t contexts = s.B * s.Kc;
  if (row >= contexts + s.B * s.M * s.Kt) return;
  const int n = columns_left(column, s.D);
  T* out = static_cast<T*>(p.out) + column;
  float value[kGroup], psi[kGroup];
  if (row < contexts) {
    // One read of a context token, M writes.
    const uint32_t b = row / s.Kc, k = row % s.Kc;
    load<kVector>(p.pos + p.context_idx[row] * s.D + column, n, psi);
    load<kVector>(static_cast<const T*>(p.context) + static_cast<int64_t>(row) * s.D + column, n,
                  value);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) value[i] += psi[i];
    for (uint32_t m = 0; m < s.M; ++m)
      store<kVector>(out + output_row(s, m, b, k) * s.D, n, value);
    return;
  }
  const uint32_t target = row - contexts;
  const uint32_t t = target % s.Kt, m = target / s.Kt % s.M, b = target / s.Kt / s.M;
  const int64_t patch = p.target_idx[target];
  load<kVector>(p.pos + patch * s.D + column, n, psi);
  const float sigma = p.sigma ? p.sigma[b * s.M + m] : 0.0f;
  if (sigma != 0.0f) {  // clean blocks draw nothing
    float noise[kGroup];
    normals(p.noise, p.noise.sample_ids[b], m, patch, column, noise);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) psi[i] += sigma * noise[i];
  }
  load<kVector>(p.mask_token + column, n, value);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) value[i] += psi[i];
  store<kVector>(out + output_row(s, m, b, s.Kc + t) * s.D, n, value);
}

template <class T, bool kVector>
__global__ __launch_bounds__(kThreads) void context_gradient_kernel(
    const __grid_constant__ ContextGradient p) {
  const Sizes& s = p.size;
  const auto [row, column] = item_of_thread(s.D);
  if (row >= s.B * s.Kc) return;
  const uint32_t b = row / s.Kc, k = row % s.Kc;
  const int n = columns_left(column, s.D);
  const T* grad = static_cast<const T*>(p.grad) + column;
  float total[kGroup] = {};
  for (uint32_t m = 0; m < s.M; ++m) {
    float part[kGroup];
    load<kVector>(grad + output_row(s, m, b, k) * s.D, n, part);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) total[i] += part[i];
  }
  store<kVector>(static_cast<T*>(p.dcontext) + static_cast<int64_t>(row) * s.D + column, n, total);
}

// A warp per target.
template <class T, bool kVector>
__global__ __launch_bounds__(kThreads) void sigma_gradient_kernel(
    const __grid_constant__ SigmaGradient p) {
  const Sizes& s = p.size;
  const uint32_t target = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (target >= s.B * s.M * s.Kt) return;
  const uint32_t t = target % s.Kt, m = target / s.Kt % s.M, b = target / s.Kt / s.M;
  const int64_t patch = p.target_idx[target], sample = p.noise.sample_ids[b];
  const T* grad = static_cast<const T*>(p.grad) + output_row(s, m, b, s.Kc + t) * s.D;
  float totals[kGroup] = {};  // short sums lose fewer digits
  for (uint32_t column = threadIdx.x % kWarp * kGroup; column < s.D; column += kWarp * kGroup) {
    const int n = columns_left(column, s.D);
    float g[kGroup], noise[kGroup];
    load<kVector>(grad + column, n, g);  // zero beyond the edge, where the noise goes on
    normals(p.noise, sample, m, patch, column, noise);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) totals[i] += g[i] * noise[i];
  }
#pragma unroll
  for (int half = kGroup / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) totals[i] += totals[i + half];
  const float total = warp_sum(totals[0]);
  if (threadIdx.x % kWarp == 0) p.dsigma[target] = total;
}

constexpr int kLaneGroups = 2;  // groups of columns of a lane
constexpr int kTile = kLaneGroups * kWarp * kGroup;

template <class T, bool kVector>
__device__ inline void add_row(
    const T* row, uint32_t first, uint32_t D, float (&total)[kLaneGroups][kGroup]) {
#pragma unroll
  for (int j = 0; j < kLaneGroups; ++j) {
    const uint32_t column = first + j * kWarp * kGroup;
    float part[kGroup];
    load<kVector>(row + column, columns_left(column, D), part);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) total[j][i] += part[i];
  }
}

// A warp owns a patch: it looks for it among the indices, and adds the rows found in their order.
// Four blocks per multiprocessor: left alone, ptxas aims at six and spills 8 bytes.
template <class T, bool kVector>
__global__ __launch_bounds__(kThreads, 4) void pos_gradient_kernel(
    const __grid_constant__ PosGradient p) {
  const Sizes& s = p.size;
  const uint32_t patch = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (patch >= s.N) return;
  const uint32_t first = blockIdx.y * kTile + lane * kGroup;
  const T* grad = static_cast<const T*>(p.grad);
  const uint32_t begin = blockIdx.z * p.per_chunk;
  const uint32_t end = begin + p.per_chunk < s.B ? begin + p.per_chunk : s.B;
  const uint32_t targets = s.M * s.Kt;
  float total[kLaneGroups][kGroup] = {};
  for (uint32_t b = begin; b < end; ++b) {
    const int64_t* context = p.context_idx + static_cast<int64_t>(b) * s.Kc;
    for (uint32_t start = 0; start < s.Kc; start += kWarp) {
      const uint32_t k = start + lane;
      unsigned found = __ballot_sync(kAll, k < s.Kc && context[k] == patch);
      for (; found; found &= found - 1)
        for (uint32_t m = 0; m < s.M; ++m)
          add_row<T, kVector>(grad + output_row(s, m, b, start + __ffs(found) - 1) * s.D, first,
                              s.D, total);
    }
    const int64_t first_target = static_cast<int64_t>(b) * targets;
    for (uint32_t start = 0; start < targets; start += kWarp) {
      const uint32_t k = start + lane;
      const bool here = k < targets && p.target_idx[first_target + k] == patch;
      for (unsigned found = __ballot_sync(kAll, here); found; found &= found - 1) {
        const uint32_t target = start + __ffs(found) - 1;
        const int64_t row = output_row(s, target / s.Kt, b, s.Kc + target % s.Kt);
        add_row<T, kVector>(grad + row * s.D, first, s.D, total);
      }
    }
  }
  float* out = p.partial + (static_cast<int64_t>(blockIdx.z) * s.N + patch) * s.D;
#pragma unroll
  for (int j = 0; j < kLaneGroups; ++j) {
    const uint32_t column = first + j * kWarp * kGroup;
    store<kVector>(out + column, columns_left(column, s.D), total[j]);
  }
}

template <class T, bool kVector>
__global__ __launch_bounds__(kThreads) void column_sums_kernel(
    const __grid_constant__ ColumnSums c) {
  __shared__ float shared[kWarps][kGroup][kWarp];
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarp + lane) * kGroup;
  const int n = columns_left(column, c.columns);
  const T* in = static_cast<const T*>(c.in) + column;
  const uint32_t begin = blockIdx.y * c.per_chunk;
  const uint32_t end = begin + c.per_chunk < c.rows ? begin + c.per_chunk : c.rows;
  float total[kGroup] = {};
  for (uint32_t r = begin + warp; r < end; r += kWarps) {
    const int64_t row = static_cast<int64_t>(r / c.length) * c.stride + c.skip + r % c.length;
    float part[kGroup];
    load<kVector>(in + row * c.columns, n, part);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) total[i] += part[i];
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) shared[warp][i][lane] = total[i];
  __syncthreads();
  if (warp > 0) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w)
#pragma unroll
    for (int i = 0; i < kGroup; ++i) total[i] += shared[w][i][lane];
  store<kVector>(c.out + blockIdx.y * c.columns + column, n, total);
}

}  // namespace

Error predictor_forward(const PredictorForward& p, Type type, bool vector, void* stream) {
  const Sizes& s = p.size;
  const dim3 grid = grid_of_items(int64_t{s.B} * (s.Kc + int64_t{s.M} * s.Kt), s.D);
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(predictor_forward_kernel<typename V::Element, V::vector>, grid, kThreads, stream,
                  p);
  });
}

Error context_gradient(const ContextGradient& p, Type type, bool vector, void* stream) {
  const dim3 grid = grid_of_items(int64_t{p.size.B} * p.size.Kc, p.size.D);
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(context_gradient_kernel<typename V::Element, V::vector>, grid, kThreads, stream,
                  p);
  });
}

Error sigma_gradient(const SigmaGradient& p, Type type, bool vector, void* stream) {
  const dim3 grid(blocks_for(int64_t{p.size.B} * p.size.M * p.size.Kt, kWarps));
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(sigma_gradient_kernel<typename V::Element, V::vector>, grid, kThreads, stream, p);
  });
}

Error pos_gradient(const PosGradient& p, Type type, bool vector, void* stream) {
  const dim3 grid(blocks_for(p.size.N, kWarps), blocks_for(p.size.D, kTile), p.chunks);
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(pos_gradient_kernel<typename V::Element, V::vector>, grid, kThreads, stream, p);
  });
}

Error column_sums(const ColumnSums& c, Type type, bool vector, void* stream) {
  const dim3 grid(blocks_for(c.columns, kWarp * kGroup), c.chunks);
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(column_sums_kernel<typename V::Element, V::vector>, grid, kThreads, stream, c);
  });
}

}  // namespace njepa::cuda
