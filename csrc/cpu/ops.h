// What the op files share: reading stable tensors, scratch, threads, the table of kernels.
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

#include "kernels.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has it under its older name
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace njepa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The kernels for the newest instruction set of this processor.
const Kernels& kernels();

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
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name,
                  " must be a contiguous CPU tensor");
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

// Indices are checked here too: an index beyond the table would read or write foreign memory.
inline const int64_t* indices(const char* name, const Tensor& tensor,
                              std::initializer_list<int64_t> shape, int64_t size) {
  const int64_t* idx = input<int64_t>(name, tensor, shape);
  const int64_t count = tensor.numel();
  uint64_t highest = 0;  // a negative index is a huge one
  for (int64_t i = 0; i < count; ++i)
    highest = std::max(highest, static_cast<uint64_t>(idx[i]));
  STD_TORCH_CHECK(count == 0 || highest < static_cast<uint64_t>(size), name,
                  " must be int64 in [0, ", size, "), got ", static_cast<int64_t>(highest));
  return idx;
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape.begin()[i], 1);
  }
  const int32_t dtype = type == ScalarType::Float  ? aoti_torch_dtype_float32()
                        : type == ScalarType::Half ? aoti_torch_dtype_float16()
                                                   : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.begin(), strides.data(), dtype,
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor floats(std::initializer_list<int64_t> shape) {
  return empty(shape, ScalarType::Float);
}

inline float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// A tensor without elements stands for None: the stable ABI has no optional results in a tuple.
inline Tensor none() { return floats({0}); }

// Runs f(begin, end) on torch's threads; `work` is about the number of elements of one item.
template <class F>
void parallel(int64_t items, int64_t work, const F& f) {
  if (items == 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, items, grain, f);
}

// The same for kernels over rows of width D, which need scratch.
template <class Args>
void parallel_rows(int64_t rows, int64_t work, int64_t D, const Args& args,
                   void (*kernel)(const Args&, int64_t, int64_t, float*)) {
  parallel(rows, work, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(kScratchRows * round_up(D, kBlock));
    kernel(args, begin, end, scratch.data());
  });
}

// For each row the positions in `rows` that name it, ascending (a counting sort).
class Inverted {
 public:
  Inverted(int64_t size, const std::vector<int64_t>& rows)
      : start_(size + 1, 0), order_(rows.size()) {
    for (int64_t row : rows) ++start_[row + 1];
    for (int64_t row = 0; row < size; ++row) start_[row + 1] += start_[row];
    std::vector<int64_t> next(start_.begin(), start_.end() - 1);
    for (size_t i = 0; i < rows.size(); ++i) order_[next[rows[i]]++] = static_cast<int64_t>(i);
  }
  Inverse get() const { return {start_.data(), order_.data()}; }

 private:
  std::vector<int64_t> start_, order_;
};

}  // namespace njepa
