// add_layer_norm on tensors.
#include "ops.h"

namespace njepa {

void add_layer_norm_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                            const Tensor& bias, double eps, const Tensor& out, const Tensor& total,
                            const Tensor& stats) {
  const int64_t rows = x.size(0), D = x.size(1);
  check("x", x, {rows, D});
  check("out", out, {rows, D});
  if (residual) {
    check("residual", *residual, {rows, D});
    check("total", total, {rows, D});
    STD_TORCH_CHECK(total.scalar_type() == residual->scalar_type(),
                    "total must have the type of residual");
  }
  input<float>("stats", stats, {2, rows});
  const AddLayerNorm args{x.data_ptr(),
                          type_of("x", x),
                          residual ? residual->data_ptr() : nullptr,
                          residual ? total.data_ptr() : nullptr,
                          residual ? type_of("residual", *residual) : Type::f32,
                          input<float>("weight", weight, {D}),
                          input<float>("bias", bias, {D}),
                          out.data_ptr(),
                          type_of("out", out),
                          data(stats),
                          data(stats) + rows,
                          static_cast<float>(eps),
                          D};
  parallel_rows(rows, 4 * D, D, args, kernels().add_layer_norm);
}

void add_layer_norm_backward(const Tensor& grad, const OptionalTensor& grad_total,
                             const Tensor& total, const Tensor& stats, const Tensor& weight,
                             const Tensor& dx, const Tensor& dresidual, const Tensor& sums) {
  const int64_t rows = total.size(0), D = total.size(1);
  const bool apart = dx.scalar_type() != total.scalar_type();
  check("grad", grad, {rows, D});
  check("total", total, {rows, D});
  check("dx", dx, {rows, D});
  if (grad_total) {
    check("grad_total", *grad_total, {rows, D});
    STD_TORCH_CHECK(grad_total->scalar_type() == total.scalar_type(),
                    "grad_total must have the type of total");
  }
  if (apart) {
    check("dresidual", dresidual, {rows, D});
    STD_TORCH_CHECK(dresidual.scalar_type() == total.scalar_type(),
                    "dresidual must have the type of total");
  }
  input<float>("sums", sums, {2, D});
  const int64_t blocks = (rows + kSumRows - 1) / kSumRows;
  std::vector<float> partial(blocks * 2 * D);
  const float* found = input<float>("stats", stats, {2, rows});
  const AddLayerNormBackward args{grad.data_ptr(),
                                  type_of("grad", grad),
                                  grad_total ? grad_total->data_ptr() : nullptr,
                                  total.data_ptr(),
                                  type_of("total", total),
                                  found,
                                  found + rows,
                                  input<float>("weight", weight, {D}),
                                  dx.data_ptr(),
                                  type_of("dx", dx),
                                  apart ? dresidual.data_ptr() : nullptr,
                                  partial.data(),
                                  rows,
                                  D};
  parallel_rows(blocks, 4 * kSumRows * D, D, args, kernels().add_layer_norm_backward);
  sum_blocks(partial, 2 * D, data(sums));
}

}  // namespace njepa
