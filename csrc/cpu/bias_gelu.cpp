// bias_gelu on tensors.
#include "ops.h"

namespace njepa {
namespace {

// The exponential and what follows cost about as much as this many copies of an element.
constexpr int64_t kGeluWork = 4;

}  // namespace

void bias_gelu_forward(const Tensor& x, const Tensor& bias, bool tanh, const Tensor& out) {
  const int64_t rows = x.size(0), D = x.size(1);
  check("x", x, {rows, D});
  check("out", out, {rows, D});
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), "out must have the type of x");
  const BiasGelu args{x.data_ptr(), type_of("x", x), input<float>("bias", bias, {D}),
                      out.data_ptr(), tanh, D};
  parallel(rows, kGeluWork * D,
           [&](int64_t begin, int64_t end) { kernels().bias_gelu(args, begin, end); });
}

void bias_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bias, bool tanh,
                        const Tensor& dx, const Tensor& dbias) {
  const int64_t rows = x.size(0), D = x.size(1);
  check("x", x, {rows, D});
  check("grad", grad, {rows, D});
  check("dx", dx, {rows, D});
  STD_TORCH_CHECK(
      grad.scalar_type() == x.scalar_type() && dx.scalar_type() == x.scalar_type(),
      "grad and dx must have the type of x");
  input<float>("dbias", dbias, {D});
  const int64_t blocks = (rows + kSumRows - 1) / kSumRows;
  std::vector<float> partial(blocks * D);
  const BiasGeluBackward args{grad.data_ptr(), x.data_ptr(), type_of("x", x),
                              input<float>("bias", bias, {D}), dx.data_ptr(), partial.data(),
                              tanh, rows, D};
  parallel(blocks, kGeluWork * kSumRows * D,
           [&](int64_t begin, int64_t end) { kernels().bias_gelu_backward(args, begin, end); });
  sum_blocks(partial, D, data(dbias));
}

}  // namespace njepa
