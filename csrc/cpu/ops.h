// The ops of this library, and what their files share: checked indices, scratch, threads, kernels.
#pragma once

#include "../common/ops.h"
#include "kernels.h"

namespace njepa {

// The ops that CUDA does not have, or with other arguments.
void patchify(const Tensor& images, int64_t side, const Tensor& affine, const OptionalTensor& idx,
              const Tensor& out);
Tensor gather_tokens_forward(const Tensor& x, const Tensor& idx, const OptionalTensor& pos);
std::tuple<Tensor, Tensor> gather_tokens_backward(
    const Tensor& grad, const Tensor& idx, int64_t N, bool need_pos);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vicreg_forward(
    const Tensor& u, double gamma, double eps);
Tensor vicreg_backward(const Tensor& u, const Tensor& mean, const Tensor& std, const Tensor& g_inv,
                       const Tensor& g_std, const Tensor& g_cov, double gamma, double eps);
void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 double rest, std::vector<Tensor> shadow);
void adamw_ema_(std::vector<Tensor> params, std::vector<Tensor> grads,
                std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                std::vector<Tensor> steps, std::vector<Tensor> targets,
                std::vector<Tensor> params_bf16, std::vector<Tensor> targets_bf16, double lr,
                double beta1, double beta2, double eps, double weight_decay, double momentum,
                double rest, double scale);
void add_layer_norm_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                            const Tensor& bias, double eps, const Tensor& out, const Tensor& total,
                            const Tensor& stats);
void add_layer_norm_backward(const Tensor& grad, const OptionalTensor& grad_total,
                             const Tensor& total, const Tensor& stats, const Tensor& weight,
                             const Tensor& dx, const Tensor& dresidual, const Tensor& sums);
void bias_gelu_forward(const Tensor& x, const Tensor& bias, bool tanh, const Tensor& out);
void bias_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bias, bool tanh,
                        const Tensor& dx, const Tensor& dbias);

// The kernels for the newest instruction set of this processor.
const Kernels& kernels();

// Indices are checked here too: an index beyond the table would read or write foreign memory.
inline const int64_t* indices(const char* name, const Tensor& tensor,
                              std::initializer_list<int64_t> shape, int64_t size) {
  const int64_t* idx = input<int64_t>(name, tensor, shape);
  const int64_t count = tensor.numel();
  uint64_t highest = 0;  // a negative index is a huge one
  for (int64_t i = 0; i < count; ++i)
    highest = std::max(highest, static_cast<uint64_t>(idx[i]));
  STD_TORCH_CHECK(count == 0 || highest < static_cast<uint64_t>(size), name,
                  " must be int64 in [0, ", size, "), got ", static_cast<int64_t>(highest));
  return idx;
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return empty(shape, type, aoti_torch_device_type_cpu(), 0);
}

inline Tensor floats(std::initializer_list<int64_t> shape) {
  return empty(shape, ScalarType::Float);
}

// A tensor without elements stands for None: the stable ABI has no optional results in a tuple.
inline Tensor none() { return floats({0}); }

// Runs f(begin, end) on torch's threads; `work` is about the number of elements of one item.
template <class F>
void parallel(int64_t items, int64_t work, const F& f) {
  if (items == 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, items, grain, f);
}

// The same for kernels over rows of width D, which need scratch.
template <class Args>
void parallel_rows(int64_t rows, int64_t work, int64_t D, const Args& args,
                   void (*kernel)(const Args&, int64_t, int64_t, float*)) {
  parallel(rows, work, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(kScratchRows * round_up(D, kBlock));
    kernel(args, begin, end, scratch.data());
  });
}

// out [width] = the sum of all blocks [blocks, width], in their order.
inline void sum_blocks(const std::vector<float>& blocks, int64_t width, float* out) {
  std::fill_n(out, width, 0.0f);
  const int64_t count = static_cast<int64_t>(blocks.size());
  for (int64_t first = 0; first < count; first += width)
    for (int64_t i = 0; i < width; ++i) out[i] += blocks[first + i];
}

// For each row the positions in `rows` that name it, ascending (a counting sort).
class Inverted {
 public:
  Inverted(int64_t size, const std::vector<int64_t>& rows)
      : start_(size + 1, 0), order_(rows.size()) {
    for (int64_t row : rows) ++start_[row + 1];
    for (int64_t row = 0; row < size; ++row) start_[row + 1] += start_[row];
    std::vector<int64_t> next(start_.begin(), start_.end() - 1);
    for (size_t i = 0; i < rows.size(); ++i) order_[next[rows[i]]++] = static_cast<int64_t>(i);
  }
  Inverse get() const { return {start_.data(), order_.data()}; }

 private:
  std::vector<int64_t> start_, order_;
};

}  // namespace njepa
