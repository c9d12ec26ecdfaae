// jepa_loss and ema_update_ on tensors.
#include <cmath>

#include "ops.h"

namespace njepa {
namespace {

std::tuple<Tensor, Tensor, Tensor> loss_forward(const Tensor& pred, const Tensor& h,
                                                const Tensor& target_idx,
                                                const OptionalTensor& weight, double beta,
                                                double eps, bool need_grad) {
  const int64_t B = h.size(0), N = h.size(1), D = h.size(2);
  const int64_t M = target_idx.size(1), Kt = target_idx.size(2), rows = B * M * Kt;
  check("h", h, {B, N, D});
  check("pred", pred, {M * B, Kt, D});
  Tensor loss = floats({});
  Tensor per_token = floats({B, M, Kt});
  Tensor slope = need_grad ? empty({M * B, Kt, D}, pred.scalar_type()) : none();
  const JepaLoss args{pred.data_ptr(),
                      type_of("pred", pred),
                      h.data_ptr(),
                      type_of("h", h),
                      indices("target_idx", target_idx, {B, M, Kt}, N),
                      input<float>("weight", weight, {B, M, Kt}),
                      data(per_token),
                      need_grad ? slope.data_ptr() : nullptr,
                      static_cast<float>(beta),
                      static_cast<float>(eps),
                      B,
                      M,
                      Kt,
                      N,
                      D};
  parallel_rows(rows, 4 * D, D, args, kernels().jepa_loss);
  double total = 0.0;
  for (int64_t row = 0; row < rows; ++row)
    total += static_cast<double>(args.per_token[row]) * (args.weight ? args.weight[row] : 1.0f);
  // 0 / 0, not a number, for a batch without targets: as the mean over nothing.
  data(loss)[0] = static_cast<float>(total / static_cast<double>(rows));
  return {loss, per_token, slope};
}

Tensor loss_backward(const Tensor& grad, const Tensor& slope) {
  STD_TORCH_CHECK(slope.is_cpu() && slope.is_contiguous(), "slope must be a contiguous CPU tensor");
  Tensor dpred = torch::stable::empty_like(slope);
  const int64_t count = slope.numel();
  const Scale args{slope.data_ptr(), dpred.data_ptr(), type_of("slope", slope),
                   *input<float>("grad", grad, {}) / static_cast<float>(count)};
  parallel(count, 1, [&](int64_t begin, int64_t end) { kernels().scale(args, begin, end); });
  return dpred;
}

// Elements that a thread takes at a time: 64 KiB of targets.
constexpr int64_t kChunk = 16384;

void ema_update(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
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

}  // namespace
}  // namespace njepa

STABLE_TORCH_LIBRARY_FRAGMENT(njepa_native, m) {
  m.def(
      "jepa_loss_forward(Tensor pred, Tensor h, Tensor target_idx, Tensor? weight, float beta, "
      "float eps, bool need_grad) -> (Tensor loss, Tensor per_token, Tensor slope)");
  m.def("jepa_loss_backward(Tensor grad, Tensor slope) -> Tensor");
  m.def(
      "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, float rest, "
      "Tensor(b!)[] shadow) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(njepa_native, CPU, m) {
  m.impl("jepa_loss_forward", TORCH_BOX(&njepa::loss_forward));
  m.impl("jepa_loss_backward", TORCH_BOX(&njepa::loss_backward));
  m.impl("ema_update_", TORCH_BOX(&njepa::ema_update));
}
