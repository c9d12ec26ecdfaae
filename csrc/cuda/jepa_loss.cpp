// jepa_loss on tensors: checks, allocations, launches.
#include "ops.h"

namespace njepa {

using namespace cuda;

static constexpr const char* kLoss = "jepa_loss";

std::tuple<Tensor, Tensor, Tensor, Tensor> jepa_loss_forward(
    const Tensor& pred, const Tensor& h, const Tensor& target_idx, const OptionalTensor& noised,
    double noise_weight, double consistency, double beta, double eps, double scale,
    double pull_pred, double pull_noised, bool need_pred, bool need_noised) {
  const Extents extents = check_loss(pred, h, target_idx, noised, need_noised);
  const auto [B, M, _, Kt, N, D] = extents;
  STD_TORCH_CHECK(D <= kWidestLoss, kLoss, ": the native CUDA kernel takes at most ", kWidestLoss,
                  " channels, got ", D, "; use impl='triton' or 'reference'");
  const Place place(pred);
  const Sizes size = sizes(kLoss, extents);
  const uint32_t blocks = loss_blocks(size);
  const ScalarType type = pred.scalar_type();
  Tensor loss = place.floats({});
  Tensor terms = noised ? place.floats({3}) : place.none();
  Tensor partial = place.floats({blocks, 3});
  Tensor dpred = need_pred ? place.empty({M * B, Kt, D}, type) : place.none();
  Tensor dnoised = need_noised ? place.empty({M * B, Kt, D}, type) : place.none();
  const JepaLoss args{pred.data_ptr(),
                      noised ? noised->data_ptr() : nullptr,
                      h.data_ptr(),
                      type_of("h", h),
                      input<int64_t>("target_idx", target_idx, {B, M, Kt}),
                      data(partial),
                      need_pred ? dpred.data_ptr() : nullptr,
                      need_noised ? dnoised.data_ptr() : nullptr,
                      static_cast<float>(scale),
                      static_cast<float>(scale * noise_weight),
                      static_cast<float>(pull_pred),
                      static_cast<float>(pull_noised),
                      static_cast<float>(beta),
                      static_cast<float>(eps),
                      loss_rows(size),
                      size};
  const Type main = type_of("pred", pred);
  const bool wide = vector(D, main, {args.pred, args.noised, args.h, args.dpred, args.dnoised});
  launched(kLoss, jepa_loss(args, main, wide, place.stream()));
  const LossTerms last{args.partial,
                       data(loss),
                       noised ? data(terms) : nullptr,
                       static_cast<float>(noise_weight),
                       static_cast<float>(consistency),
                       blocks,
                       B * M * Kt};
  launched(kLoss, loss_terms(last, place.stream()));
  return {loss, terms, dpred, dnoised};
}

void jepa_loss_backward(const Tensor& grad, std::vector<Tensor> slopes, std::vector<Tensor> out,
                        double factor) {
  check_scaling(slopes, out);
  STD_TORCH_CHECK(slopes.size() <= 2, "slopes must be at most 2 tensors");
  const Place place(slopes[0]);
  Scale args{};
  args.tensors = static_cast<uint32_t>(slopes.size());
  args.factor = input<float>("grad", grad, {});
  args.scale = static_cast<float>(factor);
  args.count = slopes[0].numel();
  const Type type = type_of("slopes", slopes[0]);
  bool wide = true;
  for (size_t i = 0; i < slopes.size(); ++i) {
    args.in[i] = slopes[i].data_ptr();
    args.out[i] = out[i].data_ptr();
    wide = wide && vector(args.count, type, {args.in[i], args.out[i]});
  }
  launched(kLoss, scale(args, type, wide, place.stream()));
}

}  // namespace njepa
