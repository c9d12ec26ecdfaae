// Whether the emulation sees a missing barrier, and a barrier that not all threads reach.
#include <cuda_runtime.h>

namespace {

struct Args {
  int* out;
  bool barrier;
};

__global__ void reverse(const Args args) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
  if (args.barrier) __syncthreads();
  args.out[threadIdx.x] = shared[63 - threadIdx.x];
  if (args.barrier) __syncthreads();
  shared[threadIdx.x] = 0;  // so that the next launch finds nothing
}

__global__ void diverge(const Args) {
  if (threadIdx.x > 3) __syncthreads();
}

__global__ void shuffle(const Args args) {
  args.out[threadIdx.x] = __shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 5) +
      1000 * __popc(__match_any_sync(~0u, threadIdx.x % 8)) +
      100000 * __shfl_up_sync(~0u, static_cast<int>(threadIdx.x % 32), 3);
}

int run(void (*kernel)(Args), Args args, bool wanted) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  return (cudaLaunchKernelEx(&config, kernel, args) == cudaSuccess) != wanted;
}

}  // namespace

int main() {
  int out[64];
  int wrong = 0, missed = 0;
  for (int i = 0; i < 2; ++i) {  // both orders
    wrong += run(reverse, {out, true}, true);
    for (int t = 0; t < 64; ++t) wrong += out[t] != 64 - t;
    run(reverse, {out, false}, true);
    for (int t = 0; t < 64; ++t) missed += out[t] != 64 - t;
    wrong += run(shuffle, {out, true}, true);
    for (int t = 0; t < 64; ++t) {
      const int lane = t % 32;
      wrong += out[t] != (t ^ 5) + 4000 + 100000 * (lane < 3 ? lane : lane - 3);
    }
    wrong += run(diverge, {out, true}, false);
  }
  std::printf("%d wrong, missing barrier %s\n", wrong, missed ? "seen" : "not seen");
  return wrong > 0 || missed == 0;
}
