// predictor_tokens: the gradient of the positions.
#include "tile.h"

namespace njepa::cuda {
namespace {

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

__global__ __launch_bounds__(kThreads) void predictor_tokens_count_kernel(
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
__global__ __launch_bounds__(kThreads) void predictor_tokens_sort_kernel(
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
__global__ __launch_bounds__(kThreads) void predictor_tokens_pos_kernel(
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

}  // namespace

Error pos_gradient(const PosGradient& p, Type type, bool vector, void* stream) {
  const dim3 sorters(p.chunks, blocks_for(p.size.N, kPatches));
  const dim3 grid(p.size.N, blocks_for(p.size.D, kTile));
  for (const auto kernel : {predictor_tokens_count_kernel, predictor_tokens_sort_kernel})
    if (Error error = launch(kernel, sorters, kThreads, stream, p)) return error;
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    const auto kernel = predictor_tokens_pos_kernel<typename V::Element, V::vector>;
    return launch(kernel, grid, kThreads, stream, p);
  });
}

}  // namespace njepa::cuda
