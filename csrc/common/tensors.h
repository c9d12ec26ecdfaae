// Reading stable tensors: what the libraries for CPU and CUDA share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "types.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has it under its older name
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace njepa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Each library says where its tensors must be: a test, and the word for messages.
bool is_here(const Tensor& tensor);
extern const char* const kPlace;

inline Type type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
      return Type::f32;
  }
}

inline void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.is_contiguous(), name, " must be a contiguous ", kPlace,
                  " tensor");
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i)
    same = tensor.size(static_cast<int64_t>(i)) == shape.begin()[i];
  STD_TORCH_CHECK(same, name, " has a wrong shape");
}

template <class T>
const T* input(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  check(name, tensor, shape);
  constexpr ScalarType type = sizeof(T) == 8 ? ScalarType::Long : ScalarType::Float;
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ",
                  sizeof(T) == 8 ? "int64" : "float32");
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
const T* input(
    const char* name, const OptionalTensor& tensor, std::initializer_list<int64_t> shape) {
  return tensor ? input<T>(name, *tensor, shape) : nullptr;
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, int32_t device_type,
                    int32_t device_index) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape.begin()[i], 1);
  }
  const int32_t dtype = type == ScalarType::Float  ? aoti_torch_dtype_float32()
                        : type == ScalarType::Half ? aoti_torch_dtype_float16()
                        : type == ScalarType::Int  ? aoti_torch_dtype_int32()
                                                   : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides.data(),
                               dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

}  // namespace njepa
