// predictor_tokens on tensors: checks, allocations, launches.
#include "ops.h"

namespace njepa {

using namespace cuda;

static constexpr const char* kPredictor = "predictor_tokens";

Tensor predictor_tokens_forward(const Tensor& context, const Tensor& pos, const Tensor& mask_token,
                                const Tensor& context_idx, const Tensor& target_idx,
                                const OptionalTensor& sigma, int64_t seed, int64_t step,
                                const OptionalTensor& step_tensor,
                                const OptionalTensor& sample_ids, bool shared) {
  const Extents extents = check_predictor(context, pos, target_idx);
  const auto [B, M, Kc, Kt, N, D] = extents;
  const Place place(context);
  Tensor out = place.empty({M * B, Kc + Kt, D}, context.scalar_type());
  const PredictorForward args{context.data_ptr(),
                              input<float>("pos", pos, {N, D}),
                              input<float>("mask_token", mask_token, {D}),
                              input<int64_t>("context_idx", context_idx, {B, Kc}),
                              input<int64_t>("target_idx", target_idx, {B, M, Kt}),
                              input<float>("sigma", sigma, {B, M}),
                              noise_of(sigma.has_value(), seed, step, step_tensor, sample_ids,
                                       shared, B),
                              out.data_ptr(),
                              sizes(kPredictor, extents)};
  const Type type = type_of("context", context);
  const bool wide = vector(D, type, {args.context, args.pos, args.mask_token, args.out});
  launched(kPredictor, predictor_forward(args, type, wide, place.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> predictor_tokens_backward(
    const Tensor& grad, const Tensor& context_idx, const Tensor& target_idx,
    int64_t seed, int64_t step, const OptionalTensor& step_tensor,
    const OptionalTensor& sample_ids, bool shared, int64_t n, bool need_pos, bool need_sigma) {
  const Extents extents = check_predictor_gradient(grad, context_idx, target_idx, n);
  const auto [B, M, Kc, Kt, N, D] = extents;
  const Place place(grad);
  void* stream = place.stream();
  const Type type = type_of("grad", grad);
  const Sizes size = sizes(kPredictor, extents);
  const Noise noise = noise_of(need_sigma, seed, step, step_tensor, sample_ids, shared, B);
  const int64_t* context = input<int64_t>("context_idx", context_idx, {B, Kc});
  const int64_t* target = input<int64_t>("target_idx", target_idx, {B, M, Kt});

  const void* from = grad.data_ptr();

  Tensor dcontext = place.empty({B, Kc, D}, grad.scalar_type());
  const ContextGradient to_context{from, dcontext.data_ptr(), size};
  const bool wide = vector(D, type, {from, to_context.dcontext});
  launched(kPredictor, context_gradient(to_context, type, wide, stream));

  constexpr int64_t most_chunks = 512;
  const int64_t per_chunk = std::max<int64_t>(1, ceil_div(B * M, most_chunks));
  const int64_t chunks = std::max<int64_t>(1, ceil_div(B * M, per_chunk));
  Tensor dmask = place.floats({D});
  Tensor partial = chunks == 1 ? dmask : place.floats({chunks, D});
  Tensor dsigma = need_sigma ? place.floats({B, M, ceil_div(D, kTile)}) : place.none();
  const TargetGradient to_targets{from,
                                  target,
                                  noise,
                                  data(partial),
                                  need_sigma ? data(dsigma) : nullptr,
                                  narrow(per_chunk),
                                  narrow(chunks),
                                  size};
  launched(kPredictor, target_gradient(to_targets, type, vector(D, type, {from}), stream));
  if (chunks > 1) {
    const ColumnSums sums{data(partial), data(dmask), narrow(D), narrow(chunks)};
    launched(kPredictor, column_sums(sums, vector(D, Type::f32, {sums.in, sums.out}), stream));
  }

  Tensor dpos = need_pos ? place.floats({N, D}) : place.none();
  if (need_pos) {
    constexpr int64_t least_rows = 256, most_sorters = 64;
    const int64_t rows = M * B * (Kc + Kt);
    const int64_t per_sorter = std::max(least_rows, ceil_div(rows, most_sorters));
    const int64_t sorters = std::max<int64_t>(1, ceil_div(rows, per_sorter));
    const auto integers = [&](std::initializer_list<int64_t> shape) {
      return place.empty(shape, ScalarType::Int);
    };
    Tensor counts = integers({sorters, N}), begin = integers({N + 1}), sorted = integers({rows});
    const auto at = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); };
    const PosGradient to_pos{from,
                             context,
                             target,
                             at(counts),
                             at(begin),
                             at(sorted),
                             data(dpos),
                             narrow(per_sorter),
                             narrow(sorters),
                             size};
    launched(kPredictor, pos_gradient(to_pos, type, vector(D, type, {from}), stream));
  }
  return {dcontext, dmask, dpos, dsigma};
}

}  // namespace njepa
