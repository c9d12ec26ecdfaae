// adamw_ema_ on tensors.
#include <cmath>

#include "ops.h"

namespace njepa {
namespace {

// Elements that a thread takes at a time: 64 KiB of each list.
constexpr int64_t kChunk = 16384;

void check_lists(const std::vector<Tensor>& params, const std::vector<Tensor>& steps,
                 const std::vector<const std::vector<Tensor>*>& wide,
                 const std::vector<const std::vector<Tensor>*>& low,
                 const std::vector<Tensor>& grads) {
  const auto plain = [&](const std::vector<Tensor>& list, bool required, ScalarType type,
                         bool any_type) {
    if (list.empty() && !required) return true;
    if (list.size() != params.size()) return false;
    for (size_t i = 0; i < list.size(); ++i)
      if (!is_here(list[i]) || !list[i].is_contiguous() ||
          list[i].numel() != params[i].numel() || (!any_type && list[i].scalar_type() != type))
        return false;
    return true;
  };
  bool fits = plain(grads, true, ScalarType::Float, true) && steps.size() == params.size();
  for (size_t i = 0; i < wide.size(); ++i)  // the last may be left out
    fits = fits && plain(*wide[i], i + 1 < wide.size(), ScalarType::Float, false);
  for (const std::vector<Tensor>* list : low)
    fits = fits && plain(*list, false, ScalarType::BFloat16, false);
  for (const Tensor& step : steps)
    fits = fits && is_here(step) && step.numel() == 1 && step.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(fits, "all lists must be of one length; params, moments, steps and targets "
                  "float32, copies bfloat16, all contiguous of the sizes of params on ", kPlace);
}

}  // namespace

void adamw_ema_(std::vector<Tensor> params, std::vector<Tensor> grads,
                std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                std::vector<Tensor> steps, std::vector<Tensor> targets,
                std::vector<Tensor> params_bf16, std::vector<Tensor> targets_bf16, double lr,
                double beta1, double beta2, double eps, double weight_decay, double momentum,
                double rest, double scale) {
  check_lists(params, steps, {&params, &exp_avgs, &exp_avg_sqs, &targets},
              {&params_bf16, &targets_bf16}, grads);
  STD_TORCH_CHECK(targets_bf16.empty() || !targets.empty(), "targets_bf16 without targets");
  const auto low = [](const std::vector<Tensor>& list, size_t i) {
    return list.empty() ? nullptr : static_cast<uint16_t*>(list[i].data_ptr());
  };
  std::vector<AdamwEma> chunks;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t count = params[i].numel();
    const Type type = type_of("grads", grads[i]);
    const double t = *data(steps[i]) += 1.0f;
    AdamwEma a{};
    a.type = type;
    a.scale = static_cast<float>(scale);
    a.take1 = static_cast<float>(1.0 - beta1);
    a.beta2 = static_cast<float>(beta2);
    a.take2 = static_cast<float>(1.0 - beta2);
    a.root = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, t)));
    a.eps = static_cast<float>(eps);
    a.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, t)));
    a.decay = static_cast<float>(1.0 - lr * weight_decay);
    a.keep = static_cast<float>(momentum);
    a.take = static_cast<float>(rest);
    for (int64_t first = 0; first < count; first += kChunk) {
      a.count = std::min(kChunk, count - first);
      a.grad = static_cast<const char*>(grads[i].data_ptr()) + first * size_of(type);
      a.param = data(params[i]) + first;
      a.exp_avg = data(exp_avgs[i]) + first;
      a.exp_avg_sq = data(exp_avg_sqs[i]) + first;
      a.target = targets.empty() ? nullptr : data(targets[i]) + first;
      a.param_low = low(params_bf16, i);
      if (a.param_low) a.param_low += first;
      a.target_low = low(targets_bf16, i);
      if (a.target_low) a.target_low += first;
      chunks.push_back(a);
    }
  }
  const Kernels& k = kernels();
  parallel(static_cast<int64_t>(chunks.size()), kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) k.adamw_ema(chunks[i]);
  });
}

}  // namespace njepa
