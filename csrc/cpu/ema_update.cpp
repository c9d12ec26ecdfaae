// ema_update_ on tensors.
#include "ops.h"

namespace njepa {
namespace {

// Elements that a thread takes at a time: 64 KiB of targets.
constexpr int64_t kChunk = 16384;

}  // namespace

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 double rest, std::vector<Tensor> shadow) {
  check_ema(targets, sources, shadow);
  std::vector<Ema> chunks;
  for (size_t i = 0; i < targets.size(); ++i) {
    const int64_t count = targets[i].numel();
    const Type type = type_of("sources", sources[i]);
    const char* source = static_cast<const char*>(sources[i].data_ptr());
    float* target = data(targets[i]);
    uint16_t* copy = shadow.empty() ? nullptr : static_cast<uint16_t*>(shadow[i].data_ptr());
    for (int64_t first = 0; first < count; first += kChunk)
      chunks.push_back({target + first, source + first * size_of(type), type,
                        copy ? copy + first : nullptr, std::min(kChunk, count - first),
                        static_cast<float>(momentum), static_cast<float>(rest)});
  }
  const Kernels& k = kernels();
  parallel(static_cast<int64_t>(chunks.size()), kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) k.ema(chunks[i]);
  });
}

}  // namespace njepa
