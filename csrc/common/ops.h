// The ops that both libraries have: signatures, and what their arguments must be.
#pragma once

#include <tuple>

#include "tensors.h"

namespace njepa {

// B batch, M blocks, Kc context and Kt target tokens per block, N patches, D width.
struct Extents {
  int64_t B, M, Kc, Kt, N, D;
};

Tensor predictor_tokens_forward(const Tensor& context, const Tensor& pos, const Tensor& mask_token,
                                const Tensor& context_idx, const Tensor& target_idx,
                                const OptionalTensor& sigma, int64_t seed, int64_t step,
                                const OptionalTensor& step_tensor,
                                const OptionalTensor& sample_ids, bool shared);

// `n`: N. Returns dcontext, dmask_token, dpos [N,D], and dsigma, to be summed over its last
// dimension.
std::tuple<Tensor, Tensor, Tensor, Tensor> predictor_tokens_backward(
    const Tensor& grad, const Tensor& context_idx, const Tensor& target_idx,
    int64_t seed, int64_t step, const OptionalTensor& step_tensor,
    const OptionalTensor& sample_ids, bool shared, int64_t n, bool need_pos, bool need_sigma);

inline Extents check_predictor(
    const Tensor& context, const Tensor& pos, const Tensor& target_idx) {
  const Extents e{context.size(0), target_idx.size(1), context.size(1),
                  target_idx.size(2), pos.size(0), context.size(2)};
  check("context", context, {e.B, e.Kc, e.D});
  return e;
}

inline Extents check_predictor_gradient(
    const Tensor& grad, const Tensor& context_idx, const Tensor& target_idx, int64_t n) {
  const Extents e{target_idx.size(0), target_idx.size(1), context_idx.size(1),
                  target_idx.size(2), n, grad.size(2)};
  check("grad", grad, {e.M * e.B, e.Kc + e.Kt, e.D});
  return e;
}

inline Noise noise_of(bool needed, int64_t seed, int64_t step, const OptionalTensor& step_tensor,
                      const OptionalTensor& sample_ids, bool shared, int64_t B) {
  STD_TORCH_CHECK(!needed || sample_ids, "sample_ids must be given with sigma");
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(step),
          input<int64_t>("step_tensor", step_tensor, {}),
          input<int64_t>("sample_ids", sample_ids, {B}), shared};
}

// loss; terms [3], and the slopes of both predictions, each without elements where there is none.
std::tuple<Tensor, Tensor, Tensor, Tensor> jepa_loss_forward(
    const Tensor& pred, const Tensor& h, const Tensor& target_idx, const OptionalTensor& noised,
    double noise_weight, double consistency, double beta, double eps, double scale,
    double pull_pred, double pull_noised, bool need_pred, bool need_noised);

void jepa_loss_backward(const Tensor& grad, std::vector<Tensor> slopes, std::vector<Tensor> out,
                        double scale);

inline Extents check_loss(const Tensor& pred, const Tensor& h, const Tensor& target_idx,
                          const OptionalTensor& noised, bool need_noised) {
  const Extents e{h.size(0), target_idx.size(1), 0, target_idx.size(2), h.size(1), h.size(2)};
  check("h", h, {e.B, e.N, e.D});
  check("pred", pred, {e.M * e.B, e.Kt, e.D});
  STD_TORCH_CHECK(noised || !need_noised, "the gradient of noised needs noised");
  if (noised) {
    check("noised", *noised, {e.M * e.B, e.Kt, e.D});
    STD_TORCH_CHECK(noised->scalar_type() == pred.scalar_type(),
                    "noised must have the type of pred");
  }
  return e;
}

// The lists of jepa_loss_backward: out[i], which may be slopes[i] itself, is written.
inline void check_scaling(const std::vector<Tensor>& slopes, const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(!slopes.empty() && slopes.size() == out.size(),
                  "slopes and out must be of one length, at least 1");
  const Tensor& first = slopes[0];
  for (const std::vector<Tensor>& list : {slopes, out})
    for (const Tensor& tensor : list)
      STD_TORCH_CHECK(is_here(tensor) && tensor.is_contiguous() &&
                          tensor.numel() == first.numel() &&
                          tensor.scalar_type() == first.scalar_type(),
                      "slopes and out must be contiguous ", kPlace,
                      " tensors of one size and type");
}

// The lists of ema_update_; one element of each at a time.
inline void check_ema(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                      const std::vector<Tensor>& shadow) {
  STD_TORCH_CHECK(sources.size() == targets.size() &&
                      (shadow.empty() || shadow.size() == targets.size()),
                  "targets, sources and shadow must be of one length");
  for (size_t i = 0; i < targets.size(); ++i) {
    const int64_t count = targets[i].numel();
    const auto fits = [count](const Tensor& tensor) {
      return is_here(tensor) && tensor.is_contiguous() && tensor.numel() == count;
    };
    bool plain = fits(targets[i]) && fits(sources[i]) &&
                 targets[i].scalar_type() == ScalarType::Float;
    if (!shadow.empty())
      plain = plain && fits(shadow[i]) && shadow[i].scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(plain, "tensor ", i,
                    ": targets must be float32, shadow bfloat16, all contiguous of one size on ",
                    kPlace);
  }
}

template <class Library>
void define_common_ops(Library& m) {
  m.def(
      "predictor_tokens_forward(Tensor context, Tensor pos, Tensor mask_token, Tensor context_idx, "
      "Tensor target_idx, Tensor? sigma, int seed, int step, Tensor? step_tensor, "
      "Tensor? sample_ids, bool shared) "
      "-> Tensor");
  m.def(
      "predictor_tokens_backward(Tensor grad, Tensor context_idx, Tensor target_idx, "
      "int seed, int step, Tensor? step_tensor, Tensor? sample_ids, bool shared, int n, "
      "bool need_pos, bool need_sigma) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "jepa_loss_forward(Tensor pred, Tensor h, Tensor target_idx, Tensor? noised, "
      "float noise_weight, float consistency, float beta, float eps, float scale, "
      "float pull_pred, float pull_noised, bool need_pred, bool need_noised) "
      "-> (Tensor loss, Tensor terms, Tensor dpred, Tensor dnoised)");
  m.def(
      "jepa_loss_backward(Tensor grad, Tensor[] slopes, Tensor(a!)[] out, float scale) -> ()");
}

template <class Library>
void implement_common_ops(Library& m) {
  m.impl("predictor_tokens_forward", TORCH_BOX(&predictor_tokens_forward));
  m.impl("predictor_tokens_backward", TORCH_BOX(&predictor_tokens_backward));
  m.impl("jepa_loss_forward", TORCH_BOX(&jepa_loss_forward));
  m.impl("jepa_loss_backward", TORCH_BOX(&jepa_loss_backward));
}

}  // namespace njepa
