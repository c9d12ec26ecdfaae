// jepa_loss: loss and slope in one pass, their weighted mean, and the scaling of the backward.
#include "device.h"

namespace njepa::cuda {
namespace {

constexpr int kGroups = 2;  // groups of columns that a thread keeps in registers

// The columns of a thread: groups first, first + stride, ...
template <bool kVector, class T>
__device__ inline void load_row(
    const T* row, uint32_t first, uint32_t stride, uint32_t D, float (&out)[kGroups][kGroup]) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const uint32_t column = first + j * stride;
    load<kVector>(row + column, columns_left(column, D), out[j]);
  }
}

// kRowThreads threads (a warp, or the block) keep a row: LayerNorm of the target, loss and slope
// from one read of each.
template <class T, bool kVector, int kRowThreads, int kThreads>
__global__ __launch_bounds__(kThreads) void jepa_loss_kernel(const __grid_constant__ JepaLoss p) {
  static_assert(kRowThreads == kWarp || kRowThreads == kThreads);
  __shared__ float shared[kThreads / kWarp];
  const Sizes& s = p.size;
  const uint32_t row = blockIdx.x * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= s.M * s.B * s.Kt) return;
  const uint32_t t = row % s.Kt, b = row / s.Kt % s.B, m = row / s.Kt / s.B;
  const int64_t target = (static_cast<int64_t>(b) * s.M + m) * s.Kt + t;
  const int64_t source = (static_cast<int64_t>(b) * s.N + p.target_idx[target]) * s.D;
  const int64_t offset = static_cast<int64_t>(row) * s.D;
  constexpr uint32_t stride = kRowThreads * kGroup;
  const uint32_t first = threadIdx.x % kRowThreads * kGroup;
  float h[kGroups][kGroup], e[kGroups][kGroup];
  load_row<kVector>(static_cast<const T*>(p.pred) + offset, first, stride, s.D, e);
  switch (p.h_type) {
    case Type::f32:
      load_row<kVector>(static_cast<const float*>(p.h) + source, first, stride, s.D, h);
      break;
    case Type::bf16:
      load_row<kVector>(static_cast<const __nv_bfloat16*>(p.h) + source, first, stride, s.D, h);
      break;
    default:
      load_row<kVector>(static_cast<const __half*>(p.h) + source, first, stride, s.D, h);
  }
  const float width = static_cast<float>(s.D);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
#pragma unroll
    for (int i = 0; i < kGroup; ++i) sum += h[j][i];
  const float mean = sum_over_threads<kRowThreads>(sum, shared) / width;
  sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      h[j][i] = i < columns_left(first + j * stride, s.D) ? h[j][i] - mean : 0.0f;
      sum += h[j][i] * h[j][i];
    }
  const float variance = sum_over_threads<kRowThreads>(sum, shared) / width;
  const float inverse = 1.0f / sqrtf(variance + p.eps);

  const float beta = p.beta, inverse_beta = beta > 0.0f ? 1.0f / beta : 0.0f;
  const float weight = p.weight ? p.weight[target] : 1.0f;
  sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const uint32_t column = first + j * stride;
    const int n = columns_left(column, s.D);
    float slope[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      // Columns beyond the edge have e = 0: they add nothing. A NaN stays one in both.
      const float x = e[j][i] - h[j][i] * inverse, size = fabsf(x);
      sum += size < beta ? 0.5f * x * x * inverse_beta : (i < n ? size - 0.5f * beta : 0.0f);
      slope[i] = weight * (x > beta ? 1.0f : x < -beta ? -1.0f : x * inverse_beta);
    }
    if (p.slope) store<kVector>(static_cast<T*>(p.slope) + offset + column, n, slope);
  }
  sum = sum_over_threads<kRowThreads>(sum, shared);
  if (first == 0) p.per_token[target] = sum / width;
}

template <class T, bool kVector, int kRowThreads, int kThreads>
Error launch_loss(const JepaLoss& p, void* stream) {
  const int64_t rows = int64_t{p.size.B} * p.size.M * p.size.Kt;
  return launch(jepa_loss_kernel<T, kVector, kRowThreads, kThreads>,
                dim3(blocks_for(rows, kThreads / kRowThreads)), kThreads, stream, p);
}

constexpr int kMeanThreads = 512;

// One block: the order of the sum does not depend on the device.
__global__ __launch_bounds__(kMeanThreads) void weighted_mean_kernel(
    const __grid_constant__ WeightedMean p) {
  __shared__ double shared[kMeanThreads / kWarp];
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < p.count; i += kMeanThreads)
    total += static_cast<double>(p.values[i]) * (p.weight ? p.weight[i] : 1.0f);
  total = sum_over_threads<kMeanThreads>(total, shared);
  // 0 / 0, not a number, for a batch without targets: as the mean over nothing.
  if (threadIdx.x == 0) *p.out = static_cast<float>(total / static_cast<double>(p.count));
}

constexpr int kScaleThreads = 256;
constexpr int kScaleGroups = 2;
constexpr int64_t kScaleBlock = int64_t{kScaleThreads} * kScaleGroups * kGroup;

template <class T, bool kVector>
__global__ __launch_bounds__(kScaleThreads) void scale_kernel(const __grid_constant__ Scale p) {
  const float factor = *p.factor * p.inverse;  // fp32: bf16 would bias every gradient
  const int64_t first = blockIdx.x * kScaleBlock + threadIdx.x * kGroup;
  float value[kScaleGroups][kGroup];
#pragma unroll
  for (int j = 0; j < kScaleGroups; ++j) {
    const int64_t at = first + j * kScaleThreads * kGroup;
    load<kVector>(static_cast<const T*>(p.in) + at, columns_left(at, p.count), value[j]);
  }
#pragma unroll
  for (int j = 0; j < kScaleGroups; ++j) {
    const int64_t at = first + j * kScaleThreads * kGroup;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) value[j][i] *= factor;
    store<kVector>(static_cast<T*>(p.out) + at, columns_left(at, p.count), value[j]);
  }
}

}  // namespace

Error jepa_loss(const JepaLoss& p, Type type, bool vector, void* stream) {
  return with_variant(type, vector, [&](auto v) {
    using T = typename decltype(v)::Element;
    constexpr bool kVector = decltype(v)::vector;
    constexpr uint32_t per_thread = kGroups * kGroup;
    if (p.size.D <= per_thread * 32) return launch_loss<T, kVector, 32, 128>(p, stream);
    if (p.size.D <= per_thread * 128) return launch_loss<T, kVector, 128, 128>(p, stream);
    static_assert(kWidestLoss == per_thread * 512);
    return launch_loss<T, kVector, 512, 512>(p, stream);
  });
}

Error weighted_mean(const WeightedMean& p, void* stream) {
  return launch(weighted_mean_kernel, dim3(1), kMeanThreads, stream, p);
}

Error scale(const Scale& p, Type type, bool vector, void* stream) {
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(scale_kernel<typename V::Element, V::vector>,
                  dim3(blocks_for(p.count, kScaleBlock)), kScaleThreads, stream, p);
  });
}

}  // namespace njepa::cuda
