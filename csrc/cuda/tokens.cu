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
__global__ __launch_bounds__(kThreads) void predictor_forward_kernel(
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
__global__ __launch_bounds__(kThreads) void context_gradient_kernel(
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

// The columns of a tile that a lane of each warp owns, summed over rows: kGroups groups of kCount.
template <class T>
struct Tile {
  static constexpr int kCount = kGroup<T>, kGroups = kTile / (kWarp * kCount);
  float total[kGroups][kCount] = {};

  // Of the whole row.
  __device__ static uint32_t column(int group) {
    return blockIdx.y * kTile + (group * kWarp + threadIdx.x % kWarp) * kCount;
  }

  // out = the sum over the warps. All threads of the block; once in a kernel.
  __device__ void sum_over_warps(float* out, uint32_t D) const {
    __shared__ float shared[kWarps][kTile];
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        shared[threadIdx.x / kWarp][column(j) % kTile + i] = total[j][i];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kTile; i += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp][i];
      if (blockIdx.y * kTile + i < D) write(out + blockIdx.y * kTile + i, sum);
    }
  }
};

// Warps go over the tokens of a block: mask token and level from one read of a gradient.
template <class T, bool kVector>
__global__ __launch_bounds__(kThreads) void target_gradient_kernel(
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

constexpr uint32_t kPatches = 2048;  // that a thread block sorts by

// The patch of a row of the output.
__device__ inline int64_t patch_of(const PosGradient& p, uint32_t row) {
  const Sizes& s = p.size;
  const uint32_t tokens = s.Kc + s.Kt, sequence = row / tokens, token = row % tokens;
  const uint32_t m = sequence / s.B, b = sequence % s.B;
  if (token < s.Kc) return read(p.context_idx + int64_t{b} * s.Kc + token);
  return read(p.target_idx + (int64_t{b} * s.M + m) * s.Kt + token - s.Kc);
}

// The patches [first, first + count) and the rows [begin, end) of a thread block.
struct Share {
  uint32_t first, count, begin, end;
};

__device__ inline Share share_of_block(const PosGradient& p) {
  const Sizes& s = p.size;
  const uint32_t first = blockIdx.y * kPatches, rows = s.M * s.B * (s.Kc + s.Kt);
  const uint32_t begin = blockIdx.x * p.per_chunk;
  return {first, s.N - first < kPatches ? s.N - first : kPatches, begin,
          rows - begin < p.per_chunk ? rows : begin + p.per_chunk};
}

__global__ __launch_bounds__(kThreads) void count_rows_kernel(
    const __grid_constant__ PosGradient p) {
  __shared__ int counts[kPatches];
  const Share share = share_of_block(p);
  for (uint32_t i = threadIdx.x; i < share.count; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (uint32_t row = share.begin + threadIdx.x; row < share.end; row += kThreads) {
    const uint64_t at = static_cast<uint64_t>(patch_of(p, row)) - share.first;
    if (at < share.count) atomicAdd(&counts[at], 1);
  }
  __syncthreads();
  int32_t* out = p.counts + int64_t{blockIdx.x} * p.size.N + share.first;
  for (uint32_t i = threadIdx.x; i < share.count; i += kThreads) write(out + i, counts[i]);
}

// The sum of `x` over the threads before this one. `sum`: over all threads.
__device__ inline int sum_before(int x, int* shared, int& sum) {
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int before = x;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAll, before, distance);
    if (lane >= distance) before += other;
  }
  if (lane == kWarp - 1) shared[warp] = before;
  before -= x;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (uint32_t w = 0; w < kWarps; ++w) {
    if (w == warp) before += sum;
    sum += shared[w];
  }
  __syncthreads();
  return before;
}

// Every thread block adds up the counts for itself: that is less than one more launch.
__global__ __launch_bounds__(kThreads) void sort_rows_kernel(
    const __grid_constant__ PosGradient p) {
  __shared__ int next[kPatches], patches[kThreads], shared[kWarps];
  const Sizes& s = p.size;
  const Share share = share_of_block(p);
  int base = 0;
  for (uint32_t start = 0; start < share.first + share.count; start += kThreads) {
    const uint32_t patch = start + threadIdx.x;
    int total = 0, before = 0;
    if (patch < share.first + share.count)
#pragma unroll 4
      for (uint32_t chunk = 0; chunk < p.chunks; ++chunk) {
        if (chunk == blockIdx.x) before = total;
        total += read(p.counts + int64_t{chunk} * s.N + patch);
      }
    int sum;
    const int at = base + sum_before(total, shared, sum);
    base += sum;
    if (patch >= share.first && patch < share.first + share.count) {
      next[patch - share.first] = at + before;
      if (blockIdx.x == 0) write(p.begin + patch, at);
    }
  }
  if (blockIdx.x == 0 && share.first + share.count == s.N && threadIdx.x == 0)
    write(p.begin + s.N, base);

  const uint32_t lane = threadIdx.x % kWarp;
  for (uint32_t start = share.begin; start < share.end; start += kThreads) {
    __syncthreads();
    const uint32_t row = start + threadIdx.x;
    const uint64_t at = row < share.end ? static_cast<uint64_t>(patch_of(p, row)) - share.first
                                        : share.count;
    patches[threadIdx.x] = at < share.count ? static_cast<int>(at) : -1;
    __syncthreads();
    if (threadIdx.x >= kWarp) continue;
    for (uint32_t i = lane; i < kThreads; i += kWarp) {  // in order, so that the sort is stable
      const int patch = patches[i];
      const unsigned same = __match_any_sync(kAll, patch);
      const int rank = __popc(same & ((1u << lane) - 1));
      const int place = patch < 0 ? 0 : next[patch] + rank;
      __syncwarp();
      if (patch >= 0) {
        write(p.rows + place, static_cast<int32_t>(start + i));
        if (rank + 1 == __popc(same)) next[patch] = place + 1;
      }
      __syncwarp();
    }
  }
}

// A thread block owns a patch, each warp a part of its rows.
template <class T, bool kVector>
__global__ __launch_bounds__(kThreads) void pos_gradient_kernel(
    const __grid_constant__ PosGradient p) {
  constexpr int count = Tile<T>::kCount, groups = Tile<T>::kGroups;
  const Sizes& s = p.size;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = read(p.begin + blockIdx.x);
  const int64_t found = read(p.begin + blockIdx.x + 1) - first;
  const uint32_t begin = first + found * warp / kWarps, end = first + found * (warp + 1) / kWarps;
  Tile<T> tile;
  for (uint32_t start = begin; start < end; start += kWarp) {
    const uint32_t here = end - start < kWarp ? end - start : kWarp;
    const int row = lane < here ? read(p.rows + start + lane) : 0;
#pragma unroll 2
    for (uint32_t i = 0; i < here; ++i) {
      const int64_t offset = int64_t{__shfl_sync(kAll, row, i)} * s.D;
#pragma unroll
      for (int j = 0; j < groups; ++j) {
        const uint32_t column = tile.column(j);
        float part[count];
        load<kVector>(static_cast<const T*>(p.grad) + offset + column,
                      columns_left<count>(column, s.D), part);
#pragma unroll
        for (int k = 0; k < count; ++k) tile.total[j][k] += part[k];
      }
    }
  }
  tile.sum_over_warps(p.dpos + int64_t{blockIdx.x} * s.D, s.D);
}

constexpr int kSumThreads = 1024;

template <bool kVector>
__global__ __launch_bounds__(kSumThreads) void column_sums_kernel(
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
    const dim3 grid = grid_of_items<T>(int64_t{s.B} * (s.Kc + int64_t{s.M} * s.Kt), s.D);
    return launch(predictor_forward_kernel<T, decltype(v)::vector>, grid, kThreads, stream, p);
  });
}

Error context_gradient(const ContextGradient& p, Type type, bool vector, void* stream) {
  return with_variant(type, vector, [&](auto v) {
    using T = typename decltype(v)::Element;
    const dim3 grid = grid_of_items<T>(int64_t{p.size.B} * p.size.Kc, p.size.D);
    return launch(context_gradient_kernel<T, decltype(v)::vector>, grid, kThreads, stream, p);
  });
}

Error target_gradient(const TargetGradient& p, Type type, bool vector, void* stream) {
  const dim3 grid(p.chunks, blocks_for(p.size.D, kTile));
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(target_gradient_kernel<typename V::Element, V::vector>, grid, kThreads, stream,
                  p);
  });
}

Error pos_gradient(const PosGradient& p, Type type, bool vector, void* stream) {
  const dim3 sorters(p.chunks, blocks_for(p.size.N, kPatches));
  const dim3 grid(p.size.N, blocks_for(p.size.D, kTile));
  if (Error error = launch(count_rows_kernel, sorters, kThreads, stream, p)) return error;
  if (Error error = launch(sort_rows_kernel, sorters, kThreads, stream, p)) return error;
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(pos_gradient_kernel<typename V::Element, V::vector>, grid, kThreads, stream, p);
  });
}

Error column_sums(const ColumnSums& c, bool vector, void* stream) {
  const dim3 grid(blocks_for(c.columns, kWarp * kGroup<float>));
  return launch(vector ? column_sums_kernel<true> : column_sums_kernel<false>, grid, kSumThreads,
                stream, c);
}

}  // namespace njepa::cuda
