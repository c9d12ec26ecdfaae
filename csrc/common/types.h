// What the kernels for CPU and CUDA both speak of; free of torch.
#pragma once

#include <cstdint>

namespace njepa {

enum class Type { f32, bf16, f16 };

static constexpr int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

struct Noise {
  uint32_t seed, step;
  const int64_t* step_at;     // where the step lies in its stead, or null
  const int64_t* sample_ids;  // [B] or null
  bool shared;                // all blocks of an image have the noise of block 0
};

}  // namespace njepa
