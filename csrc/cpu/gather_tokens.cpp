// gather_tokens on tensors.
#include "ops.h"

namespace njepa {

Tensor gather_tokens_forward(const Tensor& x, const Tensor& idx, const OptionalTensor& pos) {
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

std::tuple<Tensor, Tensor> gather_tokens_backward(
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

}  // namespace njepa
