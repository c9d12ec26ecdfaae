// What the kernels for CPU and CUDA both speak of; free of torch.
#pragma once

#include <cstdint>

namespace njepa {

enum class Type { f32, bf16, f16 };

static constexpr int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

}  // namespace njepa
