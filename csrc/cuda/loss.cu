// jepa_loss: terms and gradients in one pass, their weighted sum, and the scaling of the backward.
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

// The sum of s(x - y) over a group of columns; gradient = slope * s'(x - y) + pull * (x - other).
// Columns beyond the edge hold zeros and add nothing. A NaN stays one in both.
template <bool kNoised>
__device__ inline float loss_of(
    const float (&x)[kGroup], const float (&y)[kGroup], const float (&other)[kGroup], float beta,
    float slope, float pull, float (&gradient)[kGroup]) {
  const float inverse_beta = beta > 0.0f ? 1.0f / beta : 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float e = x[i] - y[i], size = fabsf(e);
    sum += size < beta ? 0.5f * e * e * inverse_beta : size - 0.5f * beta;
    gradient[i] = slope * (e > beta ? 1.0f : e < -beta ? -1.0f : e * inverse_beta);
    if constexpr (kNoised)
      if (pull != 0.0f) gradient[i] += pull * (x[i] - other[i]);
  }
  return sum;
}

// kRowThreads threads (a warp, or the block) keep a row: LayerNorm of the target, the terms of the
// loss and the gradients from one read of each.
template <class T, bool kVector, bool kNoised, int kRowThreads, int kThreads>
__global__ __launch_bounds__(kThreads) void jepa_loss_kernel(const __grid_constant__ JepaLoss p) {
  static_assert(kRowThreads == kWarp || kRowThreads == kThreads);
  constexpr int at_once = kThreads / kRowThreads;
  static_assert(kLossRows % at_once == 0);
  __shared__ float shared[kThreads / kWarp];
  const Sizes& s = p.size;
  const float width = static_cast<float>(s.D);
  constexpr uint32_t stride = kRowThreads * kGroup;
  const uint32_t first = threadIdx.x % kRowThreads * kGroup;
  float sums[3] = {0.0f, 0.0f, 0.0f};
  for (int turn = 0; turn < kLossRows / at_once; ++turn) {
    const uint32_t row = blockIdx.x * kLossRows + turn * at_once + threadIdx.x / kRowThreads;
    if (row >= s.M * s.B * s.Kt) break;
    const uint32_t t = row % s.Kt, b = row / s.Kt % s.B, m = row / s.Kt / s.B;
    const int64_t target = (static_cast<int64_t>(b) * s.M + m) * s.Kt + t;
    const int64_t source = (static_cast<int64_t>(b) * s.N + p.target_idx[target]) * s.D;
    const int64_t offset = static_cast<int64_t>(row) * s.D;
    float y[kGroups][kGroup], pred[kGroups][kGroup], noised[kGroups][kGroup];
    load_row<kVector>(static_cast<const T*>(p.pred) + offset, first, stride, s.D, pred);
    if constexpr (kNoised)
      load_row<kVector>(static_cast<const T*>(p.noised) + offset, first, stride, s.D, noised);
    switch (p.h_type) {
      case Type::f32:
        load_row<kVector>(static_cast<const float*>(p.h) + source, first, stride, s.D, y);
        break;
      case Type::bf16:
        load_row<kVector>(static_cast<const __nv_bfloat16*>(p.h) + source, first, stride, s.D, y);
        break;
      default:
        load_row<kVector>(static_cast<const __half*>(p.h) + source, first, stride, s.D, y);
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sum += y[j][i];
    const float mean = sum_over_threads<kRowThreads>(sum, shared) / width;
    sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        y[j][i] = i < columns_left(first + j * stride, s.D) ? y[j][i] - mean : 0.0f;
        sum += y[j][i] * y[j][i];
      }
    const float variance = sum_over_threads<kRowThreads>(sum, shared) / width;
    const float inverse = 1.0f / sqrtf(variance + p.eps);

#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const uint32_t column = first + j * stride;
      const int n = columns_left(column, s.D);
      float gradient[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) y[j][i] *= inverse;
      sums[0] +=
          loss_of<kNoised>(pred[j], y[j], noised[j], p.beta, p.slope_pred, p.pull_pred, gradient);
      if (p.dpred) store<kVector>(static_cast<T*>(p.dpred) + offset + column, n, gradient);
      if constexpr (kNoised) {
        sums[1] += loss_of<true>(
            noised[j], y[j], pred[j], p.beta, p.slope_noised, p.pull_noised, gradient);
        if (p.dnoised) store<kVector>(static_cast<T*>(p.dnoised) + offset + column, n, gradient);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const float apart = noised[j][i] - pred[j][i];
          sums[2] += apart * apart;
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < (kNoised ? 3 : 1); ++k) sums[k] = sum_over_threads<kThreads>(sums[k], shared);
  if (threadIdx.x == 0)
    for (int k = 0; k < 3; ++k) p.partial[3 * int64_t{blockIdx.x} + k] = sums[k] / width;
}

template <class T, bool kVector, int kRowThreads, int kThreads>
Error launch_loss(const JepaLoss& p, void* stream) {
  const auto kernel = p.noised ? jepa_loss_kernel<T, kVector, true, kRowThreads, kThreads>
                               : jepa_loss_kernel<T, kVector, false, kRowThreads, kThreads>;
  return launch(kernel, dim3(loss_blocks(p.size)), kThreads, stream, p);
}

constexpr int kTermThreads = 512;

// One block: the order of the sums does not depend on the device.
__global__ __launch_bounds__(kTermThreads) void loss_terms_kernel(
    const __grid_constant__ LossTerms p) {
  __shared__ double shared[kTermThreads / kWarp];
  double terms[3] = {0.0, 0.0, 0.0};
  for (uint32_t i = threadIdx.x; i < p.blocks; i += kTermThreads)
#pragma unroll
    for (int k = 0; k < 3; ++k) terms[k] += p.partial[3 * int64_t{i} + k];
#pragma unroll
  for (double& term : terms)
    // 0 / 0, not a number, for a batch without targets: as the mean over nothing.
    term = sum_over_threads<kTermThreads>(term, shared) / static_cast<double>(p.rows);
  if (threadIdx.x != 0) return;
  *p.loss = static_cast<float>(
      p.terms ? terms[0] + p.noise_weight * terms[1] + p.consistency * terms[2] : terms[0]);
  if (p.terms)
    for (int k = 0; k < 3; ++k) p.terms[k] = static_cast<float>(terms[k]);
}

constexpr int kScaleThreads = 256;
constexpr int kScaleGroups = 2;
constexpr int64_t kScaleBlock = int64_t{kScaleThreads} * kScaleGroups * kGroup;

template <class T, bool kVector>
__global__ __launch_bounds__(kScaleThreads) void scale_kernel(const __grid_constant__ Scale p) {
  const float factor = *p.factor * p.scale;  // fp32: bf16 would bias every gradient
  const T* in = static_cast<const T*>(p.in[blockIdx.y]);
  T* out = static_cast<T*>(p.out[blockIdx.y]);
  if (in == out && factor == 1.0f) return;
  const int64_t first = blockIdx.x * kScaleBlock + threadIdx.x * kGroup;
  float value[kScaleGroups][kGroup];
#pragma unroll
  for (int j = 0; j < kScaleGroups; ++j) {
    const int64_t at = first + j * kScaleThreads * kGroup;
    load<kVector>(in + at, columns_left(at, p.count), value[j]);
  }
#pragma unroll
  for (int j = 0; j < kScaleGroups; ++j) {
    const int64_t at = first + j * kScaleThreads * kGroup;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) value[j][i] *= factor;
    store<kVector>(out + at, columns_left(at, p.count), value[j]);
  }
}

}  // namespace

uint32_t loss_blocks(const Sizes& size) {
  return blocks_for(int64_t{size.M} * size.B * size.Kt, kLossRows);
}

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

Error loss_terms(const LossTerms& p, void* stream) {
  return launch(loss_terms_kernel, dim3(1), kTermThreads, stream, p);
}

Error scale(const Scale& p, Type type, bool vector, void* stream) {
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(scale_kernel<typename V::Element, V::vector>,
                  dim3(blocks_for(p.count, kScaleBlock), p.tensors), kScaleThreads, stream, p);
  });
}

}  // namespace njepa::cuda
