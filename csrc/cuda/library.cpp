// The ops on tensors: checks, allocations, launches on the device and stream of the caller.
//
// With NJEPA_EMULATED the same code takes CPU tensors, for kernels that run in the emulation.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/tensors.h"
#include "kernels.h"

#ifdef NJEPA_EMULATED
extern "C" void watch_allow(const void* begin, uint64_t bytes);  // what a call allocates
#endif

namespace njepa {

#ifdef NJEPA_EMULATED
#define NJEPA_LIBRARY njepa_native_emulated
#define NJEPA_KEY CPU
bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
const char* const kPlace = "CPU";
#else
#define NJEPA_LIBRARY njepa_native_cuda
#define NJEPA_KEY CUDA
bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }
const char* const kPlace = "CUDA";
#endif

namespace cuda {
namespace {

// Everything of a call happens on the device of one tensor and on the current stream there.
class Place {
 public:
#ifdef NJEPA_EMULATED
  explicit Place(const Tensor&) {}
  int32_t type() const { return aoti_torch_device_type_cpu(); }
#else
  explicit Place(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  int32_t type() const { return aoti_torch_device_type_cuda(); }
#endif
  void* stream() const { return stream_; }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const {
    Tensor tensor = njepa::empty(shape, type, this->type(), index_);
#ifdef NJEPA_EMULATED
    watch_allow(tensor.data_ptr(), tensor.numel() * tensor.element_size());
#endif
    return tensor;
  }
  Tensor floats(std::initializer_list<int64_t> shape) const {
    return empty(shape, ScalarType::Float);
  }
  // A tensor without elements stands for None: the stable ABI has no optional results in a tuple.
  Tensor none() const { return floats({0}); }

 private:
  int32_t index_ = 0;
  void* stream_ = nullptr;
#ifndef NJEPA_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

void launched(const char* op, Error error) {
  STD_TORCH_CHECK(error == nullptr, op, ": the CUDA kernel was not launched: ", error);
}

// Whether rows of width D that start at these addresses can be read 16 bytes at a time.
bool vector(int64_t D, Type type, std::initializer_list<const void*> addresses) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return D * size_of(type) % 16 == 0 && bits % 16 == 0;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The kernels count rows, and groups of 4 columns in rows, in 32 bits.
Sizes sizes(
    const char* op, int64_t B, int64_t M, int64_t Kc, int64_t Kt, int64_t N, int64_t D) {
  constexpr int64_t most = INT32_MAX;
  const int64_t groups = std::max(std::max(Kc + M * Kt, M * (Kc + Kt)) * B, N) *
      std::max<int64_t>(1, ceil_div(D, 4));
  STD_TORCH_CHECK(groups <= most, op, ": too many tokens for one call: got ", groups,
                  " groups of 4 channels, at most ", most, "; split the batch");
  const auto narrow = [](int64_t size) { return static_cast<uint32_t>(size); };
  return {narrow(B), narrow(M), narrow(Kc), narrow(Kt), narrow(N), narrow(D)};
}

Noise noise_of(bool needed, const OptionalTensor& sample_ids, int64_t seed, int64_t step,
               bool shared, int64_t B) {
  STD_TORCH_CHECK(!needed || sample_ids, "sample_ids must be given with sigma");
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(step),
          input<int64_t>("sample_ids", sample_ids, {B}), shared};
}

constexpr const char* kPredictor = "predictor_tokens";

Tensor predictor_tokens_forward(const Tensor& context, const Tensor& pos, const Tensor& mask_token,
                                const Tensor& context_idx, const Tensor& target_idx,
                                const OptionalTensor& sigma, int64_t seed, int64_t step,
                                const OptionalTensor& sample_ids, bool shared) {
  const int64_t B = context.size(0), Kc = context.size(1), D = context.size(2), N = pos.size(0);
  const int64_t M = target_idx.size(1), Kt = target_idx.size(2);
  check("context", context, {B, Kc, D});
  const Place place(context);
  Tensor out = place.empty({M * B, Kc + Kt, D}, context.scalar_type());
  const PredictorForward args{context.data_ptr(),
                              input<float>("pos", pos, {N, D}),
                              input<float>("mask_token", mask_token, {D}),
                              input<int64_t>("context_idx", context_idx, {B, Kc}),
                              input<int64_t>("target_idx", target_idx, {B, M, Kt}),
                              input<float>("sigma", sigma, {B, M}),
                              noise_of(sigma.has_value(), sample_ids, seed, step, shared, B),
                              out.data_ptr(),
                              sizes(kPredictor, B, M, Kc, Kt, N, D)};
  const Type type = type_of("context", context);
  const bool wide = vector(D, type, {args.context, args.pos, args.mask_token, args.out});
  launched(kPredictor, predictor_forward(args, type, wide, place.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> predictor_tokens_backward(
    const Tensor& grad, const Tensor& context_idx, const Tensor& target_idx,
    const OptionalTensor& sample_ids, int64_t seed, int64_t step, bool shared, int64_t N,
    bool need_pos, bool need_sigma) {
  const int64_t B = target_idx.size(0), M = target_idx.size(1), Kt = target_idx.size(2);
  const int64_t Kc = context_idx.size(1), D = grad.size(2);
  check("grad", grad, {M * B, Kc + Kt, D});
  const Place place(grad);
  void* stream = place.stream();
  const Type type = type_of("grad", grad);
  const Sizes size = sizes(kPredictor, B, M, Kc, Kt, N, D);
  const Noise noise = noise_of(need_sigma, sample_ids, seed, step, shared, B);
  const int64_t* context = input<int64_t>("context_idx", context_idx, {B, Kc});
  const int64_t* target = input<int64_t>("target_idx", target_idx, {B, M, Kt});

  const void* from = grad.data_ptr();
  const auto narrow = [](int64_t number) { return static_cast<uint32_t>(number); };

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

constexpr const char* kLoss = "jepa_loss";

std::tuple<Tensor, Tensor, Tensor, Tensor> jepa_loss_forward(
    const Tensor& pred, const Tensor& h, const Tensor& target_idx, const OptionalTensor& noised,
    double noise_weight, double consistency, double beta, double eps, double scale,
    double pull_pred, double pull_noised, bool need_pred, bool need_noised) {
  const int64_t B = h.size(0), N = h.size(1), D = h.size(2);
  const int64_t M = target_idx.size(1), Kt = target_idx.size(2);
  check("h", h, {B, N, D});
  check("pred", pred, {M * B, Kt, D});
  check_second(pred, noised, need_noised);
  STD_TORCH_CHECK(D <= kWidestLoss, kLoss, ": the native CUDA kernel takes at most ", kWidestLoss,
                  " channels, got ", D, "; use impl='triton' or 'reference'");
  const Place place(pred);
  const Sizes size = sizes(kLoss, B, M, 0, Kt, N, D);
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

constexpr const char* kEma = "ema_update_";

// `rates`: momentum and rest on the device, instead of the numbers.
void ema_update(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
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
      table.blocks += static_cast<uint32_t>(blocks);
    }
    flush();
  }
}

std::string version() { return NJEPA_VERSION; }

}  // namespace
}  // namespace cuda
}  // namespace njepa

STABLE_TORCH_LIBRARY(NJEPA_LIBRARY, m) {
  m.def("version() -> str");
  m.def(
      "predictor_tokens_forward(Tensor context, Tensor pos, Tensor mask_token, Tensor context_idx, "
      "Tensor target_idx, Tensor? sigma, int seed, int step, Tensor? sample_ids, bool shared) "
      "-> Tensor");
  m.def(
      "predictor_tokens_backward(Tensor grad, Tensor context_idx, Tensor target_idx, "
      "Tensor? sample_ids, int seed, int step, bool shared, int n, bool need_pos, "
      "bool need_sigma) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "jepa_loss_forward(Tensor pred, Tensor h, Tensor target_idx, Tensor? noised, "
      "float noise_weight, float consistency, float beta, float eps, float scale, "
      "float pull_pred, float pull_noised, bool need_pred, bool need_noised) "
      "-> (Tensor loss, Tensor terms, Tensor dpred, Tensor dnoised)");
  m.def(
      "jepa_loss_backward(Tensor grad, Tensor[] slopes, Tensor(a!)[] out, float scale) -> ()");
  m.def(
      "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, float rest, "
      "Tensor? rates, Tensor(b!)[] shadow) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(NJEPA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&njepa::cuda::version));
}

STABLE_TORCH_LIBRARY_IMPL(NJEPA_LIBRARY, NJEPA_KEY, m) {
  m.impl("predictor_tokens_forward", TORCH_BOX(&njepa::cuda::predictor_tokens_forward));
  m.impl("predictor_tokens_backward", TORCH_BOX(&njepa::cuda::predictor_tokens_backward));
  m.impl("jepa_loss_forward", TORCH_BOX(&njepa::cuda::jepa_loss_forward));
  m.impl("jepa_loss_backward", TORCH_BOX(&njepa::cuda::jepa_loss_backward));
  m.impl("ema_update_", TORCH_BOX(&njepa::cuda::ema_update));
}
