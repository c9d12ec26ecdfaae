// patchify on tensors.
#include "ops.h"

namespace njepa {

void patchify(const Tensor& images, int64_t side, const Tensor& affine, const OptionalTensor& idx,
              const Tensor& out) {
  STD_TORCH_CHECK(images.is_cpu() && images.dim() == 4 && images.size(3) == 3 &&
                      images.scalar_type() == ScalarType::Byte,
                  "images must be a uint8 CPU tensor [B,H,W,3]");
  const int64_t B = images.size(0), H = images.size(1), Wd = images.size(2);
  STD_TORCH_CHECK(side > 0 && H % side == 0 && Wd % side == 0, "H and W must be multiples of ",
                  side, ", got ", H, " x ", Wd);
  const int64_t pixel = images.stride(2), channel = images.stride(3);
  STD_TORCH_CHECK(pixel == 1 || (pixel == 3 && channel == 1),
                  "the bytes of a pixel or of a line must be neighbours");
  const int64_t columns = Wd / side, N = H / side * columns, length = 3 * side * side;
  const int64_t K = idx ? idx->size(1) : N;
  check("out", out, {B, K, length});
  const float* factors = input<float>("affine", affine, {2, 3});
  Patchify args{static_cast<const uint8_t*>(images.data_ptr()),
                images.stride(0),
                images.stride(1),
                pixel,
                channel,
                idx ? indices("idx", *idx, {B, K}, N) : nullptr,
                out.data_ptr(),
                type_of("out", out),
                {},
                {},
                K,
                side,
                columns};
  for (int c = 0; c < 3; ++c) {
    args.scale[c] = factors[c];
    args.shift[c] = factors[3 + c];
  }
  parallel_rows(B * K, length, length, args, kernels().patchify);
}

}  // namespace njepa
