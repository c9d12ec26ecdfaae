// jepa_loss: terms and gradients in one pass, their weighted sum, and the scaling of the backward.
#include "device.h"

namespace njepa::cuda {
namespace {

constexpr int kColumns = 16;  // of a row, that a thread keeps in registers

// The columns of a thread: groups first, first + stride, ...
template <bool kVector, class T, int kGroups, int kCount>
__device__ inline void load_columns(const T* row, bool known, uint32_t first, uint32_t stride,
                                    uint32_t D, float (&out)[kGroups][kCount]) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j)
    load_row<kVector>(row, known, first + j * stride, D, out[j]);
}

// The sum of s(x - y) over a group of columns; gradient = slope * s'(x - y) + pull * (x - other).
// Columns beyond the edge hold zeros and add nothing. A NaN stays one in both.
template <bool kNoised, int kCount>
__device__ inline float loss_of(
    const float (&x)[kCount], const float (&y)[kCount], const float (&other)[kCount], float beta,
    float slope, float pull, float (&gradient)[kCount]) {
  const float inverse_beta = beta > 0.0f ? 1.0f / beta : 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
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
// Left to itself ptxas aims at 72 registers in one of the variants and spills 8 bytes.
template <class T, bool kVector, bool kNoised, int kRowThreads, int kThreads>
__global__ __launch_bounds__(kThreads, 640 / kThreads) void jepa_loss_kernel(
    const __grid_constant__ JepaLoss p) {
  static_assert(kRowThreads == kWarp || kRowThreads == kThreads);
  constexpr int at_once = kThreads / kRowThreads, count = kGroup<T>, groups = kColumns / count;
  __shared__ float shared[kThreads / kWarp];
  const Sizes& s = p.size;
  const float width = static_cast<float>(s.D);
  constexpr uint32_t stride = kRowThreads * count;
  const uint32_t first = threadIdx.x % kRowThreads * count;
  const uint32_t begin = blockIdx.x * p.rows, all = s.M * s.B * s.Kt;
  const uint32_t end = all - begin < p.rows ? all : begin + p.rows;
  float sums[3] = {0.0f, 0.0f, 0.0f};
  for (uint32_t row = begin + threadIdx.x / kRowThreads; row < end; row += at_once) {
    const uint32_t t = row % s.Kt, b = row / s.Kt % s.B, m = row / s.Kt / s.B;
    const int64_t target = (static_cast<int64_t>(b) * s.M + m) * s.Kt + t;
    const int64_t patch = read(p.target_idx + target);
    const bool known = static_cast<uint64_t>(patch) < s.N;
    const int64_t source = known ? (static_cast<int64_t>(b) * s.N + patch) * s.D : 0;
    const int64_t offset = static_cast<int64_t>(row) * s.D;
    float y[groups][count], pred[groups][count], noised[groups][count];
    const auto fetch = [&](const auto* from, bool exists, auto& to) {
      load_columns<kVector>(from, exists, first, stride, s.D, to);
    };
    fetch(static_cast<const T*>(p.pred) + offset, true, pred);
    if constexpr (kNoised) fetch(static_cast<const T*>(p.noised) + offset, true, noised);
    switch (p.h_type) {
      case Type::f32:
        fetch(static_cast<const float*>(p.h) + source, known, y);
        break;
      case Type::bf16:
        fetch(static_cast<const __nv_bfloat16*>(p.h) + source, known, y);
        break;
      default:
        fetch(static_cast<const __half*>(p.h) + source, known, y);
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < groups; ++j)
#pragma unroll
      for (int i = 0; i < count; ++i) sum += y[j][i];
    const float mean = sum_over_threads<kRowThreads>(sum, shared) / width;
    sum = 0.0f;
#pragma unroll
    for (int j = 0; j < groups; ++j)
#pragma unroll
      for (int i = 0; i < count; ++i) {
        y[j][i] = i < columns_left<count>(first + j * stride, s.D) ? y[j][i] - mean : 0.0f;
        sum += y[j][i] * y[j][i];
      }
    const float variance = sum_over_threads<kRowThreads>(sum, shared) / width;
    const float inverse = 1.0f / sqrtf(variance + p.eps);

#pragma unroll
    for (int j = 0; j < groups; ++j) {
      const uint32_t column = first + j * stride;
      const int n = columns_left<count>(column, s.D);
      float gradient[count];
#pragma unroll
      for (int i = 0; i < count; ++i) y[j][i] *= inverse;
      sums[0] +=
          loss_of<kNoised>(pred[j], y[j], noised[j], p.beta, p.slope_pred, p.pull_pred, gradient);
      if (p.dpred) store<kVector>(static_cast<T*>(p.dpred) + offset + column, n, gradient);
      if constexpr (kNoised) {
        sums[1] += loss_of<true>(
            noised[j], y[j], pred[j], p.beta, p.slope_noised, p.pull_noised, gradient);
        if (p.dnoised) store<kVector>(static_cast<T*>(p.dnoised) + offset + column, n, gradient);
#pragma unroll
        for (int i = 0; i < count; ++i) {
          const float apart = noised[j][i] - pred[j][i];
          sums[2] += apart * apart;
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < (kNoised ? 3 : 1); ++k) sums[k] = sum_over_threads<kThreads>(sums[k], shared);
  if (threadIdx.x == 0)
    for (int k = 0; k < 3; ++k) write(p.partial + 3 * int64_t{blockIdx.x} + k, sums[k] / width);
}

template <class T, bool kVector, int kRowThreads, int kThreads>
Error launch_loss(const JepaLoss& p, void* stream) {
  const auto kernel = p.noised ? jepa_loss_kernel<T, kVector, true, kRowThreads, kThreads>
                               : jepa_loss_kernel<T, kVector, false, kRowThreads, kThreads>;
  return launch(kernel, dim3(loss_blocks(p.size)), kThreads, stream, p);
}

constexpr int kTermThreads = 512;

// One block: the order of the sums does not depend on the device.
__global__ __launch_bounds__(kTermThreads) void jepa_loss_terms_kernel(
    const __grid_constant__ LossTerms p) {
  __shared__ double shared[kTermThreads / kWarp];
  double terms[3] = {0.0, 0.0, 0.0};
  for (uint32_t i = threadIdx.x; i < p.blocks; i += kTermThreads)
#pragma unroll
    for (int k = 0; k < 3; ++k) terms[k] += read(p.partial + 3 * int64_t{i} + k);
#pragma unroll
  for (double& term : terms)
    // 0 / 0, not a number, for a batch without targets: as the mean over nothing.
    term = sum_over_threads<kTermThreads>(term, shared) / static_cast<double>(p.rows);
  if (threadIdx.x != 0) return;
  write(p.loss, static_cast<float>(
      p.terms ? terms[0] + p.noise_weight * terms[1] + p.consistency * terms[2] : terms[0]));
  if (p.terms)
    for (int k = 0; k < 3; ++k) write(p.terms + k, static_cast<float>(terms[k]));
}

constexpr int kScaleThreads = 256;
constexpr int kScaleColumns = 16;  // of a thread
constexpr int64_t kScaleBlock = int64_t{kScaleThreads} * kScaleColumns;

template <class T, bool kVector>
__global__ __launch_bounds__(kScaleThreads) void jepa_loss_scale_kernel(
    const __grid_constant__ Scale p) {
  const float factor = read(p.factor) * p.scale;  // fp32: bf16 would bias every gradient
  const T* in = static_cast<const T*>(p.in[blockIdx.y]);
  T* out = static_cast<T*>(p.out[blockIdx.y]);
  if (in == out && factor == 1.0f) return;
  constexpr int count = kGroup<T>, groups = kScaleColumns / count;
  const int64_t first = blockIdx.x * kScaleBlock + threadIdx.x * count;
  float value[groups][count];
#pragma unroll
  for (int j = 0; j < groups; ++j) {
    const int64_t at = first + j * kScaleThreads * count;
    load<kVector>(in + at, columns_left<count>(at, p.count), value[j]);
  }
#pragma unroll
  for (int j = 0; j < groups; ++j) {
    const int64_t at = first + j * kScaleThreads * count;
#pragma unroll
    for (int i = 0; i < count; ++i) value[j][i] *= factor;
    store<kVector>(out + at, columns_left<count>(at, p.count), value[j]);
  }
}

}  // namespace

uint32_t loss_rows(const Sizes& size) {
  constexpr uint32_t least = 4;  // a row per warp
  return least * blocks_for(int64_t{size.M} * size.B * size.Kt, int64_t{least} * kMostLossBlocks);
}

uint32_t loss_blocks(const Sizes& size) {
  const uint32_t rows = loss_rows(size);
  return rows == 0 ? 0 : blocks_for(int64_t{size.M} * size.B * size.Kt, rows);
}

Error jepa_loss(const JepaLoss& p, Type type, bool vector, void* stream) {
  return with_variant(type, vector, [&](auto v) {
    using T = typename decltype(v)::Element;
    constexpr bool kVector = decltype(v)::vector;
    if (p.size.D <= kColumns * 32) return launch_loss<T, kVector, 32, 128>(p, stream);
    if (p.size.D <= kColumns * 128) return launch_loss<T, kVector, 128, 128>(p, stream);
    static_assert(kWidestLoss == kColumns * 512);
    return launch_loss<T, kVector, 512, 512>(p, stream);
  });
}

Error loss_terms(const LossTerms& p, void* stream) {
  return launch(jepa_loss_terms_kernel, dim3(1), kTermThreads, stream, p);
}

Error scale(const Scale& p, Type type, bool vector, void* stream) {
  return with_variant(type, vector, [&](auto v) {
    using V = decltype(v);
    return launch(jepa_loss_scale_kernel<typename V::Element, V::vector>,
                  dim3(blocks_for(p.count, kScaleBlock), p.tensors), kScaleThreads, stream, p);
  });
}

}  // namespace njepa::cuda
