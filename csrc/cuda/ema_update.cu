// ema_update_: one launch for up to EmaTable::kTensors tensors.
#include "device.h"

namespace njepa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = kGroup<float>;  // of the targets; 8 bytes of a bf16 source or shadow
constexpr int kGroups = EmaTable::kChunk / (kThreads * kColumns);

struct Chunk {
  float* target;
  const void* source;
  __nv_bfloat16* shadow;
  int64_t count;
};

template <class T, bool kVector>
__device__ inline void update(const Chunk& c, float momentum, float rest) {
  float target[kGroups][kColumns], source[kGroups][kColumns];
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int at = (j * kThreads + threadIdx.x) * kColumns;
    const int n = columns_left<kColumns>(at, c.count);
    load<kVector>(static_cast<const T*>(c.source) + at, n, source[j]);
    load<kVector>(c.target + at, n, target[j]);
  }
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int at = (j * kThreads + threadIdx.x) * kColumns;
    const int n = columns_left<kColumns>(at, c.count);
    // Rounded as target.mul_(m).add_(source, alpha=1-m).
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      target[j][i] = __fmaf_rn(rest, source[j][i], __fmul_rn(momentum, target[j][i]));
    store<kVector>(c.target + at, n, target[j]);
    if (c.shadow) store<kVector>(c.shadow + at, n, target[j]);
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void ema_update_kernel(
    const __grid_constant__ EmaTable table) {
  // The last tensor that begins at or before this block.
  int low = 0, high = table.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first[middle] <= blockIdx.x ? low : high) = middle;
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x - table.first[low]) * EmaTable::kChunk;
  Chunk c{table.target[low] + first, static_cast<const T*>(table.source[low]) + first,
          static_cast<__nv_bfloat16*>(table.shadow[low]), table.count[low] - first};
  if (c.shadow) c.shadow += first;
  const float momentum = table.rates ? read(table.rates) : table.momentum;
  const float rest = table.rates ? read(table.rates + 1) : table.rest;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(c.target) |
                         reinterpret_cast<uintptr_t>(c.source) |
                         reinterpret_cast<uintptr_t>(c.shadow);
  if (bits % 16 == 0 && c.count >= EmaTable::kChunk)
    update<T, true>(c, momentum, rest);
  else
    update<T, false>(c, momentum, rest);
}

}  // namespace

Error ema(const EmaTable& table, Type source, void* stream) {
  const dim3 grid(table.blocks);
  switch (source) {
    case Type::f32:
      return launch(ema_update_kernel<float>, grid, kThreads, stream, table);
    case Type::bf16:
      return launch(ema_update_kernel<__nv_bfloat16>, grid, kThreads, stream, table);
    default:
      return launch(ema_update_kernel<__half>, grid, kThreads, stream, table);
  }
}

}  // namespace njepa::cuda
