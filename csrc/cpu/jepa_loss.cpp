// jepa_loss on tensors.
#include "ops.h"

namespace njepa {

std::tuple<Tensor, Tensor, Tensor, Tensor> jepa_loss_forward(
    const Tensor& pred, const Tensor& h, const Tensor& target_idx, const OptionalTensor& noised,
    double noise_weight, double consistency, double beta, double eps, double scale,
    double pull_pred, double pull_noised, bool need_pred, bool need_noised) {
  const auto [B, M, _, Kt, N, D] = check_loss(pred, h, target_idx, noised, need_noised);
  const int64_t rows = B * M * Kt;
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

void jepa_loss_backward(const Tensor& grad, std::vector<Tensor> slopes, std::vector<Tensor> out,
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

}  // namespace njepa
