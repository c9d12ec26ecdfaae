// What the gradients that are sums over rows share.
#pragma once

#include "device.h"

namespace njepa::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarp;

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

}  // namespace njepa::cuda
