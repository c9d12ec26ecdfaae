// Enough of CUDA C++ for csrc/cuda to compile with a C++ compiler and to run on a CPU.
//
// Blocks run one after the other; the threads of a block are fibers (ucontext) on one thread of the
// system, which change at barriers and shuffles only. Every second launch goes through blocks and
// threads backwards: what lacks a barrier gives other bits then. A barrier that not all threads
// reach is a failed launch.
//
// With NJEPA_ACCESS (see csrc/cuda/device.h) every access to memory is known. While the machine
// watches, it counts them, by allocation and in sectors, and refuses those outside of all.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace cuda_emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr uint64_t kSector = 32;  // bytes, that the memory moves at least

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  unsigned accesses = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[kWarp];
};

struct Allocation {
  uint64_t begin, end, read = 0, written = 0;
};

// One instruction of a warp: the n-th access of each of its lanes, where all take the same way.
struct Request {
  uint64_t instruction, sector;
  auto operator<=>(const Request&) const = default;
};

struct Watch {
  bool on = false;
  std::vector<Allocation> allocations;
  uint64_t outside = 0, sectors = 0;
  std::vector<Request> requests;  // of the block that runs
};

struct Machine {
  dim3 grid, block, block_index, thread_index;
  std::function<void()> body;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  unsigned current = 0, launches = 0;
  bool progress = false;
  Watch watch;
};
inline Machine machine;

// Whether the access may happen: a lane that reads outside gets zeros, and the watch counts it.
inline bool access(const void* address, uint64_t bytes, bool write) {
  Watch& watch = machine.watch;
  if (!watch.on) return true;
  Fiber& fiber = machine.fibers[machine.current];
  const uint64_t at = reinterpret_cast<uint64_t>(address);
  for (Allocation& a : watch.allocations) {
    if (at < a.begin || at + bytes > a.end) continue;
    (write ? a.written : a.read) += bytes;
    const uint64_t warp = machine.current / kWarp;
    watch.requests.push_back({warp << 32 | fiber.accesses++, at / kSector});
    return true;
  }
  ++watch.outside;
  return false;
}

inline void end_of_block() {
  std::vector<Request>& requests = machine.watch.requests;
  std::sort(requests.begin(), requests.end());
  const auto end = std::unique(requests.begin(), requests.end());
  machine.watch.sectors += static_cast<uint64_t>(end - requests.begin());
  requests.clear();
}

inline void yield() {
  swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
}

inline void wait(Barrier& barrier, unsigned members) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
    machine.progress = true;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void enter() {
  machine.body();
  machine.fibers[machine.current].done = true;
  machine.progress = true;
  yield();
}

// What `read` makes of the values of all 32 lanes, which all take part.
template <class T, class F>
auto exchange(T value, const F& read) {
  static_assert(sizeof(T) <= 8);
  Warp& warp = machine.warps[machine.current / kWarp];
  std::memcpy(&warp.values[machine.current % kWarp], &value, sizeof(T));
  wait(warp.barrier, kWarp);
  const auto result = read([&](unsigned lane) {
    T other;
    std::memcpy(&other, &warp.values[lane], sizeof(T));
    return other;
  });
  wait(warp.barrier, kWarp);  // before the next exchange overwrites it
  return result;
}

// One block; false if its threads wait for one another forever.
inline bool run_block(bool backwards) {
  const unsigned threads = machine.block.x;
  machine.barrier = {};
  machine.warps.assign((threads + kWarp - 1) / kWarp, {});
  if (machine.fibers.size() < threads) machine.fibers = std::vector<Fiber>(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.done = false;
    fiber.accesses = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left > 0;) {
    machine.progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      machine.current = backwards ? threads - 1 - i : i;
      Fiber& fiber = machine.fibers[machine.current];
      if (fiber.done) continue;
      machine.thread_index = dim3(machine.current, 0, 0);
      swapcontext(&machine.scheduler, &fiber.context);
      if (fiber.done) --left;
    }
    if (!machine.progress) return false;
  }
  return true;
}

inline bool run_grid(dim3 grid, dim3 block, std::function<void()> body) {
  machine.grid = grid;
  machine.block = block;
  machine.body = std::move(body);
  const bool backwards = machine.launches++ % 2;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t at = backwards ? blocks - 1 - i : i;
    machine.block_index = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
    if (!run_block(backwards)) return false;
    end_of_block();
  }
  return true;
}

}  // namespace cuda_emulation

#define threadIdx (cuda_emulation::machine.thread_index)
#define blockIdx (cuda_emulation::machine.block_index)
#define NJEPA_ACCESS(address, bytes, write) cuda_emulation::access(address, bytes, write)

inline void __syncthreads() {
  cuda_emulation::wait(cuda_emulation::machine.barrier, cuda_emulation::machine.block.x);
}

inline void __syncwarp() {
  cuda_emulation::exchange(0, [](auto value_of) { return value_of(0); });
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_emulation::exchange(value, [=](auto value_of) { return value_of(lane); });
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return __shfl_sync(~0u, value, (threadIdx.x % 32) ^ distance);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return __shfl_sync(~0u, value, lane < distance ? lane : lane - distance);
}

template <class T>
unsigned __match_any_sync(unsigned, T value) {
  return cuda_emulation::exchange(value, [=](auto value_of) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      bits |= static_cast<unsigned>(value_of(lane) == value) << lane;
    return bits;
  });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const bool fits = grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535 &&
                    block.x <= 1024 && block.y == 1 && block.z == 1 &&
                    (sizeof(Arguments) + ... + 0) <= 4096;
  if (!fits || uint64_t{grid.x} * grid.y * grid.z * block.x == 0)
    return cudaErrorInvalidConfiguration;
  return cuda_emulation::run_grid(grid, block, [&] { kernel(arguments...); })
      ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "not all threads reach a barrier"
                                         : "invalid configuration argument";
}
