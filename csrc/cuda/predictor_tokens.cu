// predictor_tokens: forward, and the gradients of context, levels and mask token.
#include "philox.h"
#include "tile.h"

namespace njepa::cuda {
namespace {

// Rows are counted in 32 bits (a 64-bit division costs 100 instructions), addresses in 64.
struct Item {
  uint32_t row, column;
};

// Threads of the grid go over groups of columns, then rows.
template <class T>
__device__ inline Item item_of_thread(uint32_t D) {
  constexpr uint32_t count = kGroup<T>;
  const uint32_t groups = (D + count - 1) / count;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  return {index / groups, index % groups * count};
}

template <class T>
dim3 grid_of_items(int64_t rows, uint32_t D) {
  return dim3(blocks_for(rows * blocks_for(D, kGroup<T>), kThreads));
}

// The row of `out` (and of its gradient) where token `token` of sample b and block m is.
__device__ inline int64_t output_row(const Sizes& s, uint32_t m, uint32_t b, uint32_t token) {
  return (static_cast<int64_t>(m) * s.B + b) * (s.Kc + s.Kt) + token;
}

template <class T, bool kVector>
__global__ __launch_bounds__(kThreads) void predictor_tokens_forward_kernel(
    const __grid_constant__ PredictorForward p) {
  constexpr int count = kGroup<T>;
  const Sizes& s = p.size;
  const auto [row, column] = item_of_thread<T>(s.D);
  const uint32_t contexts = s.B * s.Kc;
  if (row >= contexts + s.B * s.M * s.Kt) return;
  const int n = columns_left<count>(column, s.D);
  const bool is_context = row < contexts;
  const uint32_t target = row - contexts;
  const int64_t patch = is_context ? read(p.context_idx + row) : read(p.target_idx + target);
  const bool known = static_cast<uint64_t>(patch) < s.N;
  T* out = static_cast<T*>(p.out) + column;
  float value[count], psi[count];
  load_row<kVector>(p.pos + (known ? patch : 0) * s.D, known, column, s.D, psi);
  if (is_context) {
    // One read of a context token, M writes.
    const uint32_t b = row / s.Kc, k = row % s.Kc;
    load<kVector>(static_cast<const T*>(p.context) + static_cast<int64_t>(row) * s.D + column, n,
                  value);
#pragma unroll
    for (int i = 0; i < count; ++i) value[i] += psi[i];
    for (uint32_t m = 0; m < s.M; ++m)
      store<kVector>(out + output_row(s, m, b, k) * s.D, n, value);
    return;
  }
  const uint32_t t = target % s.Kt, m = target / s.Kt % s.M, b = target / s.Kt / s.M;
  const float sigma = p.sigma ? read(p.sigma + b * s.M + m) : 0.0f;
  if (sigma != 0.0f) {  // clean blocks draw nothing
    float noise[count];
    normals(p.noise, read(p.noise.sample_ids + b), m, patch, column, noise);
#pragma unroll
    for (int i = 0; i < count; ++i) psi[i] += sigma * noise[i];
  }
  load<kVector>(p.mask_token + column, n, value);
#pragma unroll
  for (int i = 0; i < count; ++i) value[i] += psi[i];
  store<kVector>(out + output_row(s, m, b, s.Kc + t) * s.D, n, value);
}

template <class T, bool kVector>
__global__ __launch_bounds__(kThreads) void predictor_tokens_context_kernel(
    const __grid_constant__ ContextGradient p) {
  constexpr int count = kGroup<T>;
  const Sizes& s = p.size;
  const auto [row, column] = item_of_thread<T>(s.D);
  if (row >= s.B * s.Kc) return;
  const uint32_t b = row / s.Kc, k = row % s.Kc;
  const int n = columns_left<count>(column, s.D);
  const T* grad = static_cast<const T*>(p.grad) + column;
  float total[count] = {};
  for (uint32_t m = 0; m < s.M; ++m) {
    float part[count];
    load<kVector>(grad + output_row(s, m, b, k) * s.D, n, part);
#pragma unroll
    for (int i = 0; i < count; ++i) total[i] += part[i];
  }
  store<kVector>(static_cast<T*>(p.dcontext) + static_cast<int64_t>(row) * s.D + column, n, total);
}

// Warps go over the tokens of a block: mask token and level from one read of a gradient. Without the
// bound nvcc saves registers by 8 bytes of local memory on sm_100.
template <class T, bool kVector>
__global__ __launch_bounds__(kThreads, 2) void predictor_tokens_target_kernel(
    const __grid_constant__ TargetGradient p) {
  constexpr int count = Tile<T>::kCount, groups = Tile<T>::kGroups;
  __shared__ float shared[kWarps];
  const Sizes& s = p.size;
  const uint32_t tiles = (s.D + kTile - 1) / kTile;
  const uint32_t begin = blockIdx.x * p.per_chunk, all = s.B * s.M;
  const uint32_t end = all - begin < p.per_chunk ? all : begin + p.per_chunk;
  Tile<T> tile;
  for (uint32_t pair = begin; pair < end; ++pair) {
    const uint32_t b = pair / s.M, m = pair % s.M;
    const int64_t sample = p.dsigma ? read(p.noise.sample_ids + b) : 0;
    float level[count] = {};  // short sums lose fewer digits
    for (uint32_t t = threadIdx.x / kWarp; t < s.Kt; t += kWarps) {
      const T* grad = static_cast<const T*>(p.grad) + output_row(s, m, b, s.Kc + t) * s.D;
      const int64_t patch = p.dsigma ? read(p.target_idx + int64_t{pair} * s.Kt + t) : 0;
#pragma unroll
      for (int j = 0; j < groups; ++j) {
        const uint32_t column = tile.column(j);
        float part[count];
        load<kVector>(grad + column, columns_left<count>(column, s.D), part);
#pragma unroll
        for (int i = 0; i < count; ++i) tile.total[j][i] += part[i];
        if (p.dsigma && column < s.D) {
          float noise[count];
          normals(p.noise, sample, m, patch, column, noise);
#pragma unroll
          for (int i = 0; i < count; ++i) level[i] += part[i] * noise[i];
        }
      }
    }
    if (!p.dsigma) continue;
#pragma unroll
    for (int half = count / 2; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) level[i] += level[i + half];
    const float total = sum_over_threads<kThreads>(level[0], shared);
    if (threadIdx.x == 0) write(p.dsigma + int64_t{pair} * tiles + blockIdx.y, total);
  }
  tile.sum_over_warps(p.dmask + int64_t{blockIdx.x} * s.D, s.D);
}

constexpr int kSumThreads = 1024;

template <bool kVector>
__global__ __launch_bounds__(kSumThreads) void predictor_tokens_sums_kernel(
    const __grid_constant__ ColumnSums c) {
  constexpr int count = kGroup<float>, warps = kSumThreads / kWarp;
  __shared__ float shared[warps][count][kWarp];
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t column = (blockIdx.x * kWarp + lane) * count;
  const int n = columns_left<count>(column, c.columns);
  float total[count] = {};
  for (uint32_t row = warp; row < c.rows; row += warps) {
    float part[count];
    load<kVector>(c.in + int64_t{row} * c.columns + column, n, part);
#pragma unroll
    for (int i = 0; i < count; ++i) total[i] += part[i];
  }
#pragma unroll
  for (int i = 0; i < count; ++i) shared[warp][i][lane] = total[i];
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < warps; ++w)
#pragma unroll
    for (int i = 0; i < count; ++i) total[i] += shared[w][i][lane];
  store<kVector>(c.out + column, n, total);
}

}  // namespace

Error predictor_forward(const PredictorForward& p, Type type, bool vector, void* stream) {
  const Sizes& s = p.size;
  return with_variant(type, vector, [&](auto v) {
    using T = typename decltype(v)::Element;
    const auto kernel = predictor_tokens_forward_kernel<T, decltype(v)::vector>;
    const dim3 grid = grid_of_items<T>(int64_t{s.B} * (s.Kc + int64_t{s.M} * s.Kt), s.D);
    return launch(kernel, grid, kThreads, stream, p);
  });
}

Error context_gradient(const ContextGradient& p, Type type, bool vector, void* stream) {
  return with_variant(type, vector, [&](auto v) {
    using T = typename decltype(v)::Element;
    const auto kernel = predictor_tokens_context_kernel<T, decltype(v)::vector>;
    const dim3 grid = grid_of_items<T>(int64_t{p.size.B} * p.size.Kc, p.size.D);
    return launch(kernel, grid, kThreads, stream, p);
  });
}

Error target_gradient(const TargetGradient& p, Type type, bool vector, void* stream) {
  const dim3 grid(p.chunks, blocks_for(p.size.D, kTile));
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    const auto kernel = predictor_tokens_target_kernel<typename V::Element, V::vector>;
    return launch(kernel, grid, kThreads, stream, p);
  });
}

Error column_sums(const ColumnSums& c, bool vector, void* stream) {
  const dim3 grid(blocks_for(c.columns, kWarp * kGroup<float>));
  const auto kernel =
      vector ? predictor_tokens_sums_kernel<true> : predictor_tokens_sums_kernel<false>;
  return launch(kernel, grid, kSumThreads, stream, c);
}

}  // namespace njepa::cuda
