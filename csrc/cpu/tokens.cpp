// gather_tokens and predictor_tokens on tensors.
#include "ops.h"

namespace njepa {
namespace {

Tensor gather_forward(const Tensor& x, const Tensor& idx, const OptionalTensor& pos) {
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), K = idx.size(1);
  check("x", x, {B, N, D});
  Tensor out = empty({B, K, D}, x.scalar_type());
  const GatherForward args{x.data_ptr(),
                           type_of("x", x),
                           indices("idx", idx, {B, K}, N),
                           input<float>("pos", pos, {N, D}),
                           out.data_ptr(),
                           N,
                           K,
                           D};
  parallel_rows(B * K, D, D, args, kernels().gather_forward);
  return out;
}

std::tuple<Tensor, Tensor> gather_backward(
    const Tensor& grad, const Tensor& idx, int64_t N, bool need_pos) {
  const int64_t B = grad.size(0), K = grad.size(1), D = grad.size(2);
  check("grad", grad, {B, K, D});
  const int64_t* index = indices("idx", idx, {B, K}, N);
  std::vector<int64_t> rows(B * K);
  for (int64_t i = 0; i < B * K; ++i) rows[i] = i / K * N + index[i];
  const Inverted inverted(B * N, rows);
  Tensor dx = empty({B, N, D}, grad.scalar_type());
  Tensor dpos = need_pos ? floats({N, D}) : none();
  const GatherBackward args{grad.data_ptr(), type_of("grad", grad), inverted.get(),
                            dx.data_ptr(),   data(dpos),            B,
                            N,               D};
  parallel_rows(B * N, D, D, args, kernels().gather_backward);
  if (need_pos) parallel_rows(N, B * K * D / std::max<int64_t>(N, 1), D, args,
                              kernels().gather_backward_pos);
  return {dx, dpos};
}

Noise noise_of(bool needed, const OptionalTensor& sample_ids, int64_t seed, int64_t step,
               bool shared, int64_t B) {
  STD_TORCH_CHECK(!needed || sample_ids, "sample_ids must be given with sigma");
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(step),
          input<int64_t>("sample_ids", sample_ids, {B}), shared};
}

// Noise costs about as much as this many copies of an element.
constexpr int64_t kNoiseWork = 8;

Tensor predictor_forward(const Tensor& context, const Tensor& pos, const Tensor& mask_token,
                         const Tensor& context_idx, const Tensor& target_idx,
                         const OptionalTensor& sigma, int64_t seed, int64_t step,
                         const OptionalTensor& sample_ids, bool shared) {
  const int64_t B = context.size(0), Kc = context.size(1), D = context.size(2), N = pos.size(0);
  const int64_t M = target_idx.size(1), Kt = target_idx.size(2);
  check("context", context, {B, Kc, D});
  Tensor out = empty({M * B, Kc + Kt, D}, context.scalar_type());
  const PredictorForward args{context.data_ptr(),
                              type_of("context", context),
                              input<float>("pos", pos, {N, D}),
                              input<float>("mask_token", mask_token, {D}),
                              indices("context_idx", context_idx, {B, Kc}, N),
                              indices("target_idx", target_idx, {B, M, Kt}, N),
                              input<float>("sigma", sigma, {B, M}),
                              noise_of(sigma.has_value(), sample_ids, seed, step, shared, B),
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

std::tuple<Tensor, Tensor, Tensor, Tensor> predictor_backward(
    const Tensor& grad, const Tensor& context_idx, const Tensor& target_idx,
    const OptionalTensor& sample_ids, int64_t seed, int64_t step, bool shared, int64_t N,
    bool need_pos, bool need_sigma) {
  const int64_t B = target_idx.size(0), M = target_idx.size(1), Kt = target_idx.size(2);
  const int64_t Kc = context_idx.size(1), D = grad.size(2);
  const int64_t targets = B * M * Kt;
  check("grad", grad, {M * B, Kc + Kt, D});
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
                               noise_of(need_sigma, sample_ids, seed, step, shared, B),
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
  float* out = data(dmask);
  std::fill_n(out, D, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < D; ++i) out[i] += mask_blocks[block * D + i];
  return {dcontext, dmask, dpos, dsigma};
}

}  // namespace
}  // namespace njepa

STABLE_TORCH_LIBRARY_FRAGMENT(njepa_native, m) {
  m.def("gather_tokens_forward(Tensor x, Tensor idx, Tensor? pos) -> Tensor");
  m.def(
      "gather_tokens_backward(Tensor grad, Tensor idx, int n, bool need_pos) -> "
      "(Tensor dx, Tensor dpos)");
  m.def(
      "predictor_tokens_forward(Tensor context, Tensor pos, Tensor mask_token, Tensor context_idx, "
      "Tensor target_idx, Tensor? sigma, int seed, int step, Tensor? sample_ids, bool shared) "
      "-> Tensor");
  m.def(
      "predictor_tokens_backward(Tensor grad, Tensor context_idx, Tensor target_idx, "
      "Tensor? sample_ids, int seed, int step, bool shared, int n, bool need_pos, "
      "bool need_sigma) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(njepa_native, CPU, m) {
  m.impl("gather_tokens_forward", TORCH_BOX(&njepa::gather_forward));
  m.impl("gather_tokens_backward", TORCH_BOX(&njepa::gather_backward));
  m.impl("predictor_tokens_forward", TORCH_BOX(&njepa::predictor_forward));
  m.impl("predictor_tokens_backward", TORCH_BOX(&njepa::predictor_backward));
}
