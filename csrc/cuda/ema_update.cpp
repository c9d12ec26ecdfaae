// ema_update_ on tensors: checks, allocations, launches.
#include "ops.h"

namespace njepa {

using namespace cuda;

static constexpr const char* kEma = "ema_update_";

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 double rest, const OptionalTensor& rates, std::vector<Tensor> shadow) {
  check_ema(targets, sources, shadow);
  if (targets.empty()) return;
  const Place place(targets[0]);
  for (const Type type : {Type::f32, Type::bf16, Type::f16}) {
    EmaTable table{};
    table.momentum = static_cast<float>(momentum);
    table.rest = static_cast<float>(rest);
    table.rates = input<float>("rates", rates, {2});
    const auto flush = [&] {
      if (table.tensors > 0) launched(kEma, ema(table, type, place.stream()));
      table.tensors = 0;
      table.blocks = 0;
    };
    for (size_t i = 0; i < targets.size(); ++i) {
      const int64_t count = targets[i].numel(), blocks = ceil_div(count, EmaTable::kChunk);
      if (type_of("sources", sources[i]) != type || count == 0) continue;
      STD_TORCH_CHECK(targets[i].get_device_index() == targets[0].get_device_index(), kEma,
                      ": all tensors of a call must be on one device");
      STD_TORCH_CHECK(blocks <= INT32_MAX, kEma, ": tensor ", i, " is too large: ", count);
      if (table.tensors == EmaTable::kTensors || table.blocks + blocks > INT32_MAX) flush();
      const int n = table.tensors++;
      table.target[n] = data(targets[i]);
      table.source[n] = sources[i].data_ptr();
      table.shadow[n] = shadow.empty() ? nullptr : shadow[i].data_ptr();
      table.count[n] = count;
      table.first[n] = table.blocks;
      table.blocks += narrow(blocks);
    }
    flush();
  }
}

}  // namespace njepa
