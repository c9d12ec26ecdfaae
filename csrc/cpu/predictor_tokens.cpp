// predictor_tokens on tensors.
#include "ops.h"

namespace njepa {
namespace {

// Noise costs about as much as this many copies of an element.
constexpr int64_t kNoiseWork = 8;

}  // namespace

Tensor predictor_tokens_forward(const Tensor& context, const Tensor& pos, const Tensor& mask_token,
                         const Tensor& context_idx, const Tensor& target_idx,
                         const OptionalTensor& sigma, int64_t seed, int64_t step,
                         const OptionalTensor& step_tensor,
                         const OptionalTensor& sample_ids, bool shared) {
  const auto [B, M, Kc, Kt, N, D] = check_predictor(context, pos, target_idx);
  Tensor out = empty({M * B, Kc + Kt, D}, context.scalar_type());
  const PredictorForward args{context.data_ptr(),
                              type_of("context", context),
                              input<float>("pos", pos, {N, D}),
                              input<float>("mask_token", mask_token, {D}),
                              indices("context_idx", context_idx, {B, Kc}, N),
                              indices("target_idx", target_idx, {B, M, Kt}, N),
                              input<float>("sigma", sigma, {B, M}),
                              noise_of(sigma.has_value(), seed, step, step_tensor, sample_ids,
                                       shared, B),
                              out.data_ptr(),
                              B,
                              M,
                              Kc,
                              Kt,
                              D};
  parallel_rows(M * B * (Kc + Kt), sigma ? kNoiseWork * D : D, D, args,
                kernels().predictor_forward);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> predictor_tokens_backward(
    const Tensor& grad, const Tensor& context_idx, const Tensor& target_idx,
    int64_t seed, int64_t step, const OptionalTensor& step_tensor,
    const OptionalTensor& sample_ids, bool shared, int64_t n, bool need_pos, bool need_sigma) {
  const auto [B, M, Kc, Kt, N, D] = check_predictor_gradient(grad, context_idx, target_idx, n);
  const int64_t targets = B * M * Kt;
  const int64_t* target = need_pos || need_sigma
      ? indices("target_idx", target_idx, {B, M, Kt}, N) : nullptr;
  std::vector<int64_t> patches;
  if (need_pos) {
    const int64_t* context = indices("context_idx", context_idx, {B, Kc}, N);
    patches.assign(context, context + B * Kc);
    patches.insert(patches.end(), target, target + targets);
  }
  const Inverted inverted(need_pos ? N : 0, patches);
  const int64_t per_block = PredictorBackward::mask_rows;
  const int64_t blocks = (targets + per_block - 1) / per_block;
  std::vector<float> mask_blocks(blocks * D);
  Tensor dcontext = empty({B, Kc, D}, grad.scalar_type());
  Tensor dmask = floats({D});
  Tensor dpos = need_pos ? floats({N, D}) : none();
  Tensor dsigma = need_sigma ? floats({B, M, Kt}) : none();
  const PredictorBackward args{grad.data_ptr(),
                               type_of("grad", grad),
                               target,
                               noise_of(need_sigma, seed, step, step_tensor, sample_ids, shared, B),
                               inverted.get(),
                               dcontext.data_ptr(),
                               mask_blocks.data(),
                               need_pos ? data(dpos) : nullptr,
                               need_sigma ? data(dsigma) : nullptr,
                               B,
                               M,
                               Kc,
                               Kt,
                               D};
  const Kernels& k = kernels();
  parallel_rows(B * Kc, M * D, D, args, k.predictor_backward_context);
  parallel_rows(blocks, args.mask_rows * D * (need_sigma ? kNoiseWork : 1), D, args,
                k.predictor_backward_targets);
  if (need_pos)
    parallel_rows(N, (B * Kc * M + targets) * D / std::max<int64_t>(N, 1), D, args,
                  k.predictor_backward_pos);
  sum_blocks(mask_blocks, D, data(dmask));
  return {dcontext, dmask, dpos, dsigma};
}

}  // namespace njepa
