// What the kernels share: 16-byte accesses, conversions, sums over threads, launching.
//
// Everything in this folder but library.cpp also compiles with a C++ compiler against
// tests/ops/cuda_emulation, which runs the kernels on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels.h"

namespace njepa::cuda {

constexpr int kWarp = 32;

// A thread works on as many neighbouring columns as 16 bytes of the main type hold: then the lanes
// of a warp move whole sectors of 32 bytes.
template <class T>
constexpr int kGroup = 16 / sizeof(T);

constexpr unsigned kAll = 0xffffffffu;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }

// Every access to memory goes through these: on a CPU the emulation counts and checks them.
#ifndef NJEPA_ACCESS
#define NJEPA_ACCESS(address, bytes, write) true
#endif

template <class T>
__device__ inline T read(const T* p) {
  return NJEPA_ACCESS(p, sizeof(T), false) ? *p : T{};
}

template <class T>
__device__ inline void write(T* p, T value) {
  if (NJEPA_ACCESS(p, sizeof(T), true)) *p = value;
}

// How many of the kCount columns from `column` on exist: at most 0 beyond the edge.
template <int kCount>
__device__ inline int columns_left(int64_t column, int64_t D) {
  return D - column < kCount ? static_cast<int>(D - column) : kCount;
}

// What one access of a thread moves: 16 bytes, or 8 of a narrower type beside a wider one.
template <int kBytes>
using Word = std::conditional_t<kBytes % 16 == 0, uint4, uint2>;

// out[i] = p[i] for i < n, else 0. Vectors: n is kCount, or at most 0.
template <bool kVector, class T, int kCount>
__device__ inline void load(const T* p, int n, float (&out)[kCount]) {
  if constexpr (kVector) {
    using W = Word<kCount * sizeof(T)>;
    constexpr int per_word = sizeof(W) / sizeof(T);
#pragma unroll
    for (int word = 0; word < kCount / per_word; ++word) {
      W bits{};
      if (n > 0) bits = read(reinterpret_cast<const W*>(p) + word);
      T values[per_word];
      __builtin_memcpy(values, &bits, sizeof(W));
#pragma unroll
      for (int i = 0; i < per_word; ++i) out[word * per_word + i] = widen(values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = i < n ? widen(read(p + i)) : 0.0f;
  }
}

template <bool kVector, class T, int kCount>
__device__ inline void store(T* p, int n, const float (&value)[kCount]) {
  if constexpr (kVector) {
    using W = Word<kCount * sizeof(T)>;
    constexpr int per_word = sizeof(W) / sizeof(T);
    if (n <= 0) return;
#pragma unroll
    for (int word = 0; word < kCount / per_word; ++word) {
      T values[per_word];
#pragma unroll
      for (int i = 0; i < per_word; ++i) narrow(value[word * per_word + i], values[i]);
      W bits;
      __builtin_memcpy(&bits, values, sizeof(W));
      write(reinterpret_cast<W*>(p) + word, bits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < n) {
        T narrowed;
        narrow(value[i], narrowed);
        write(p + i, narrowed);
      }
  }
}

// The same for a row that an index names: an index out of range reads nothing and gives NaN.
template <bool kVector, class T, int kCount>
__device__ inline void load_row(
    const T* row, bool known, int64_t column, int64_t D, float (&out)[kCount]) {
  load<kVector>(row + column, known ? columns_left<kCount>(column, D) : 0, out);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (!known) out[i] = nanf("");
}

// The sum over the warp, the same bits in every lane.
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

// The sum over kThreads threads, which are a warp or the whole block. `shared`: one per warp.
template <int kThreads, class T>
__device__ inline T sum_over_threads(T x, T* shared) {
  x = warp_sum(x);
  if constexpr (kThreads > kWarp) {
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = T(0);
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) x += shared[warp];
    __syncthreads();  // before the next sum overwrites it
  }
  return x;
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <class Args>
Error launch(void (*kernel)(Args), dim3 grid, unsigned threads, void* stream, const Args& args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  const cudaError_t pending = cudaGetLastError();
  if (error == cudaSuccess) error = pending;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T, bool kVector>
struct Variant {
  using Element = T;
  static constexpr bool vector = kVector;
};

// f(Variant) for an element type and a way of access.
template <class F>
Error with_variant(Type type, bool vector, const F& f) {
  switch (type) {
    case Type::f32:
      return vector ? f(Variant<float, true>{}) : f(Variant<float, false>{});
    case Type::bf16:
      return vector ? f(Variant<__nv_bfloat16, true>{}) : f(Variant<__nv_bfloat16, false>{});
    default:
      return vector ? f(Variant<__half, true>{}) : f(Variant<__half, false>{});
  }
}

}  // namespace njepa::cuda
