// vicreg on tensors: the covariance term by products on the smaller side.
#include <cmath>

#include "ops.h"

namespace njepa {
namespace {

struct Sizes {
  int64_t M, n, D, panel;
  bool samples;  // the smaller side: samples (n x n) or channels (D x D)
  int64_t side() const { return samples ? n : D; }
  int64_t depth() const { return samples ? D : n; }
  int64_t panels(int64_t side) const { return (side + panel - 1) / panel; }
};

Sizes sizes_of(const Tensor& u) {
  const int64_t M = u.size(0), n = u.size(1), D = u.size(2);
  check("u", u, {M, n, D});
  STD_TORCH_CHECK(n > 1 && M > 0 && D > 0, "u must have views, 2 samples and channels");
  return {M, n, D, kernels().panel, n < D};
}

std::vector<float> pack(const Tensor& u, const float* mean, const Sizes& s, bool samples) {
  const int64_t side = samples ? s.n : s.D, depth = samples ? s.D : s.n;
  const int64_t panels = s.panels(side);
  std::vector<float> packed(s.M * panels * depth * s.panel);
  const VicregPack args{u.data_ptr(), type_of("u", u), mean, packed.data(), samples, s.M, s.n, s.D};
  parallel(s.M * panels, depth * s.panel, [&](int64_t begin, int64_t end) {
    kernels().vicreg_pack(args, begin, end);
  });
  return packed;
}

int64_t gram_tasks(const Sizes& s) {
  const int64_t tiles = round_up(s.side(), kBlock) / kBlock;
  return s.M * tiles * (tiles + 1) / 2;
}

void run_gram(const Gram& args, const Sizes& s) {
  parallel(gram_tasks(s), args.depth * kBlock, [&](int64_t begin, int64_t end) {
    kernels().gram(args, begin, end);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vicreg_forward(
    const Tensor& u, double gamma, double eps) {
  const Sizes s = sizes_of(u);
  Tensor inv = floats({}), std_term = floats({}), cov = floats({});
  Tensor mean = floats({s.M, s.D}), std = floats({s.M, s.D});
  const int64_t blocks = round_up(s.D, kBlock) / kBlock;
  std::vector<double> partial(3 * blocks);
  const VicregMoments moments{u.data_ptr(),
                              type_of("u", u),
                              static_cast<float>(gamma),
                              static_cast<float>(eps),
                              data(mean),
                              data(std),
                              partial.data(),
                              s.M,
                              s.n,
                              s.D};
  parallel(blocks, 2 * s.M * s.n * kBlock, [&](int64_t begin, int64_t end) {
    kernels().vicreg_moments(moments, begin, end);
  });
  const std::vector<float> packed = pack(u, data(mean), s, s.samples);
  std::vector<double> squares(gram_tasks(s));
  // On the side of the channels the variances are left out before squaring; on the other side they
  // are in the sum and are subtracted below.
  run_gram({packed.data(), s.M, s.side(), s.depth(), s.samples, squares.data(), nullptr}, s);
  double spread = 0.0, hinge = 0.0, variances = 0.0, total = 0.0;
  for (int64_t block = 0; block < blocks; ++block) {
    spread += partial[3 * block];
    hinge += partial[3 * block + 1];
    variances += partial[3 * block + 2];
  }
  for (double square : squares) total += square;
  const double M = static_cast<double>(s.M), n = static_cast<double>(s.n);
  const double D = static_cast<double>(s.D);
  total /= (n - 1.0) * (n - 1.0);
  if (s.samples) total -= variances;
  data(inv)[0] = static_cast<float>(2.0 / std::max(M - 1.0, 1.0) * spread / (n * D));
  data(std_term)[0] = static_cast<float>(hinge / (M * D));
  data(cov)[0] = static_cast<float>(2.0 / M * total / D);
  return {inv, std_term, cov, mean, std};
}

Tensor vicreg_backward(const Tensor& u, const Tensor& mean, const Tensor& std, const Tensor& g_inv,
                       const Tensor& g_std, const Tensor& g_cov, double gamma, double eps) {
  const Sizes s = sizes_of(u);
  const float* means = input<float>("mean", mean, {s.M, s.D});
  const float* stds = input<float>("std", std, {s.M, s.D});
  const double M = static_cast<double>(s.M), n = static_cast<double>(s.n);
  const double D = static_cast<double>(s.D);
  const double for_inv = *input<float>("g_inv", g_inv, {}) * 4.0 / (std::max(M - 1.0, 1.0) * n * D);
  const double for_std = *input<float>("g_std", g_std, {}) / (M * D * (n - 1.0));
  const double for_cov = *input<float>("g_cov", g_cov, {}) * 8.0 / (M * D * (n - 1.0));

  const std::vector<float> by_sample = pack(u, means, s, true);
  const std::vector<float> by_channel = pack(u, means, s, false);
  std::vector<float> gram(s.M * s.panels(s.side()) * s.side() * s.panel);
  run_gram({s.samples ? by_sample.data() : by_channel.data(), s.M, s.side(), s.depth(), s.samples,
            nullptr, gram.data()},
           s);
  std::vector<float> channel(s.M * s.D);
  for (int64_t i = 0; i < s.M * s.D; ++i) {
    const double deviation = stds[i];
    channel[i] = static_cast<float>(deviation < gamma ? -for_std / deviation : 0.0);
    // On the side of the samples the product holds the diagonal, which does not count.
    if (s.samples) channel[i] -= static_cast<float>(for_cov * (deviation * deviation - eps));
  }
  Tensor du = empty({s.M, s.n, s.D}, u.scalar_type());
  const int64_t gram_view = s.panels(s.side()) * s.side() * s.panel;
  const VicregBackward args{
      u.data_ptr(),
      type_of("u", u),
      means,
      channel.data(),
      s.samples ? gram.data() : by_sample.data(),
      s.samples ? by_channel.data() : gram.data(),
      s.samples ? gram_view : s.panels(s.n) * s.D * s.panel,
      s.samples ? s.panels(s.D) * s.n * s.panel : gram_view,
      s.side(),
      static_cast<float>(for_inv),
      static_cast<float>(for_cov / (n - 1.0)),
      du.data_ptr(),
      s.M,
      s.n,
      s.D};
  const int64_t tiles = round_up(s.n, kBlock) / kBlock * (round_up(s.D, kBlock) / kBlock);
  parallel(s.M * tiles, s.side() * kBlock, [&](int64_t begin, int64_t end) {
    kernels().vicreg_backward(args, begin, end);
  });
  return du;
}

}  // namespace njepa
