// jepa_loss and ema_update_ on tensors.
#include <cmath>

#include "ops.h"

namespace njepa {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_forward(
    const Tensor& pred, const Tensor& h, const Tensor& target_idx, const OptionalTensor& noised,
    double noise_weight, double consistency, double beta, double eps, double scale,
    double pull_pred, double pull_noised, bool need_pred, bool need_noised) {
  const int64_t B = h.size(0), N = h.size(1), D = h.size(2);
  const int64_t M = target_idx.size(1), Kt = target_idx.size(2), rows = B * M * Kt;
  check("h", h, {B, N, D});
  check("pred", pred, {M * B, Kt, D});
  check_second(pred, noised, need_noised);
  const ScalarType type = pred.scalar_type();
  Tensor loss = floats({});
  Tensor terms = noised ? floats({3}) : none();
  Tensor dpred = need_pred ? empty({M * B, Kt, D}, type) : none();
  Tensor dnoised = need_noised ? empty({M * B, Kt, D}, type) : none();
  const int64_t count = noised ? 3 : 1;
  std::vector<float> means(count * rows);
  const JepaLoss args{pred.data_ptr(),
                      noised ? noised->data_ptr() : nullptr,
                      type_of("pred", pred),
                      h.data_ptr(),
                      type_of("h", h),
                      indices("target_idx", target_idx, {B, M, Kt}, N),
                      means.data(),
                      need_pred ? dpred.data_ptr() : nullptr,
                      need_noised ? dnoised.data_ptr() : nullptr,
                      static_cast<float>(scale),
                      static_cast<float>(scale * noise_weight),
                      static_cast<float>(pull_pred),
                      static_cast<float>(pull_noised),
                      static_cast<float>(beta),
                      static_cast<float>(eps),
                      B,
                      M,
                      Kt,
                      N,
                      D};
  parallel_rows(rows, 4 * count * D, D, args, kernels().jepa_loss);
  double total[3] = {0.0, 0.0, 0.0};
  for (int64_t i = 0; i < count * rows; ++i) total[i % count] += means[i];
  // 0 / 0, not a number, for a batch without targets: as the mean over nothing.
  for (double& term : total) term /= static_cast<double>(rows);
  data(loss)[0] = static_cast<float>(
      noised ? total[0] + noise_weight * total[1] + consistency * total[2] : total[0]);
  if (noised) std::copy_n(total, 3, data(terms));
  return {loss, terms, dpred, dnoised};
}

void loss_backward(const Tensor& grad, std::vector<Tensor> slopes, std::vector<Tensor> out,
                   double scale) {
  check_scaling(slopes, out);
  const float factor = *input<float>("grad", grad, {}) * static_cast<float>(scale);
  for (size_t i = 0; i < slopes.size(); ++i) {
    const Scale args{slopes[i].data_ptr(), out[i].data_ptr(), type_of("slopes", slopes[i]), factor};
    if (args.in == args.out && factor == 1.0f) continue;
    parallel(slopes[i].numel(), 1,
             [&](int64_t begin, int64_t end) { kernels().scale(args, begin, end); });
  }
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
      "jepa_loss_forward(Tensor pred, Tensor h, Tensor target_idx, Tensor? noised, "
      "float noise_weight, float consistency, float beta, float eps, float scale, "
      "float pull_pred, float pull_noised, bool need_pred, bool need_noised) "
      "-> (Tensor loss, Tensor terms, Tensor dpred, Tensor dnoised)");
  m.def(
      "jepa_loss_backward(Tensor grad, Tensor[] slopes, Tensor(a!)[] out, float scale) -> ()");
  m.def(
      "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, float rest, "
      "Tensor(b!)[] shadow) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(njepa_native, CPU, m) {
  m.impl("jepa_loss_forward", TORCH_BOX(&njepa::loss_forward));
  m.impl("jepa_loss_backward", TORCH_BOX(&njepa::loss_backward));
  m.impl("ema_update_", TORCH_BOX(&njepa::ema_update));
}
