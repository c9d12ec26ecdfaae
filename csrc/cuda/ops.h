// What the op files share: device, stream, allocations, launches.
//
// With NJEPA_EMULATED the same code takes CPU tensors, for kernels that run in the emulation.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/ops.h"
#include "kernels.h"

#ifdef NJEPA_EMULATED
extern "C" void watch_allow(const void* begin, uint64_t bytes);  // what a call allocates
#endif

namespace njepa {

// `rates`: momentum and rest on the device, instead of the numbers.
void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 double rest, const OptionalTensor& rates, std::vector<Tensor> shadow);

namespace cuda {

// Everything of a call happens on the device of one tensor and on the current stream there.
class Place {
 public:
#ifdef NJEPA_EMULATED
  explicit Place(const Tensor&) {}
  int32_t type() const { return aoti_torch_device_type_cpu(); }
#else
  explicit Place(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  int32_t type() const { return aoti_torch_device_type_cuda(); }
#endif
  void* stream() const { return stream_; }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const {
    Tensor tensor = njepa::empty(shape, type, this->type(), index_);
#ifdef NJEPA_EMULATED
    watch_allow(tensor.data_ptr(), tensor.numel() * tensor.element_size());
#endif
    return tensor;
  }
  Tensor floats(std::initializer_list<int64_t> shape) const {
    return empty(shape, ScalarType::Float);
  }
  // A tensor without elements stands for None: the stable ABI has no optional results in a tuple.
  Tensor none() const { return floats({0}); }

 private:
  int32_t index_ = 0;
  void* stream_ = nullptr;
#ifndef NJEPA_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void launched(const char* op, Error error) {
  STD_TORCH_CHECK(error == nullptr, op, ": the CUDA kernel was not launched: ", error);
}

// Whether rows of width D that start at these addresses can be read 16 bytes at a time.
inline bool vector(int64_t D, Type type, std::initializer_list<const void*> addresses) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return D * size_of(type) % 16 == 0 && bits % 16 == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline uint32_t narrow(int64_t number) { return static_cast<uint32_t>(number); }

// The kernels count rows, and groups of 4 columns in rows, in 32 bits.
inline Sizes sizes(const char* op, const Extents& e) {
  constexpr int64_t most = INT32_MAX;
  const int64_t groups =
      std::max(std::max(e.Kc + e.M * e.Kt, e.M * (e.Kc + e.Kt)) * e.B, e.N) *
      std::max<int64_t>(1, ceil_div(e.D, 4));
  STD_TORCH_CHECK(groups <= most, op, ": too many tokens for one call: got ", groups,
                  " groups of 4 channels, at most ", most, "; split the batch");
  return {narrow(e.B), narrow(e.M), narrow(e.Kc), narrow(e.Kt), narrow(e.N), narrow(e.D)};
}

}  // namespace cuda
}  // namespace njepa
