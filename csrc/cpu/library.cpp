// The library as a whole: its ops, and which instruction set runs.
#include "ops.h"

namespace njepa {
namespace {

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found;
#ifdef NJEPA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) found.push_back(&avx512::kernels());
  if (avx2) found.push_back(&avx2::kernels());
#endif
  found.push_back(&baseline::kernels());
  return found;
}

const Kernels*& chosen() {
  static const Kernels* table = tables().front();
  return table;
}

std::string version() { return NJEPA_VERSION; }

// The instruction sets that can run here, the best first, separated by spaces.
std::string instruction_sets() {
  std::string names;
  for (const Kernels* table : tables()) {
    if (!names.empty()) names += ' ';
    names += table->name;
  }
  return names;
}

// For tests and for tracking down a wrong result; returns the one used before.
std::string use_instruction_set(const std::string& name) {
  for (const Kernels* table : tables()) {
    if (name != table->name) continue;
    const std::string before = chosen()->name;
    chosen() = table;
    return before;
  }
  STD_TORCH_CHECK(false, "no instruction set ", name, " here, got: ", instruction_sets());
  return "";
}

// Normals [dim] of one token, for tests of the noise stream.
Tensor token_normals(const Tensor& counter, int64_t seed, int64_t step, int64_t dim) {
  const int64_t* word = input<int64_t>("counter", counter, {3});
  std::vector<float> out(round_up(dim, kBlock));
  kernels().normals(static_cast<uint32_t>(seed), static_cast<uint32_t>(step),
                    static_cast<uint32_t>(word[0]), static_cast<uint32_t>(word[1]),
                    static_cast<uint32_t>(word[2]), dim, out.data());
  Tensor result = floats({dim});
  std::copy_n(out.data(), dim, data(result));
  return result;
}

}  // namespace

bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
const char* const kPlace = "CPU";

const Kernels& kernels() { return *chosen(); }

}  // namespace njepa

STABLE_TORCH_LIBRARY(njepa_native, m) {
  m.def("version() -> str");
  m.def("instruction_sets() -> str");
  m.def("use_instruction_set(str name) -> str");
  m.def("token_normals(Tensor counter, int seed, int step, int dim) -> Tensor");
  m.def("patchify(Tensor images, int side, Tensor affine, Tensor? idx, Tensor(a!) out) -> ()");
  m.def("gather_tokens_forward(Tensor x, Tensor idx, Tensor? pos) -> Tensor");
  m.def(
      "gather_tokens_backward(Tensor grad, Tensor idx, int n, bool need_pos) -> "
      "(Tensor dx, Tensor dpos)");
  njepa::define_common_ops(m);
  m.def(
      "vicreg_forward(Tensor u, float gamma, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "vicreg_backward(Tensor u, Tensor mean, Tensor std, Tensor g_inv, Tensor g_std, "
      "Tensor g_cov, float gamma, float eps) -> Tensor");
  m.def(
      "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, float rest, "
      "Tensor(b!)[] shadow) -> ()");
  m.def(
      "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] targets, "
      "Tensor(f!)[] params_bf16, Tensor(g!)[] targets_bf16, float lr, float beta1, float beta2, "
      "float eps, float weight_decay, float momentum, float rest, float scale) -> ()");
  m.def(
      "add_layer_norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, "
      "Tensor(a!) out, Tensor(b!) total, Tensor(c!) stats) -> ()");
  m.def(
      "add_layer_norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor stats, "
      "Tensor weight, Tensor(a!) dx, Tensor(b!) dresidual, Tensor(c!) sums) -> ()");
  m.def("bias_gelu_forward(Tensor x, Tensor bias, bool tanh, Tensor(a!) out) -> ()");
  m.def(
      "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, bool tanh, Tensor(a!) dx, "
      "Tensor(b!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(njepa_native, CPU, m) {
  m.impl("patchify", TORCH_BOX(&njepa::patchify));
  m.impl("gather_tokens_forward", TORCH_BOX(&njepa::gather_tokens_forward));
  m.impl("gather_tokens_backward", TORCH_BOX(&njepa::gather_tokens_backward));
  njepa::implement_common_ops(m);
  m.impl("vicreg_forward", TORCH_BOX(&njepa::vicreg_forward));
  m.impl("vicreg_backward", TORCH_BOX(&njepa::vicreg_backward));
  m.impl("ema_update_", TORCH_BOX(&njepa::ema_update_));
  m.impl("adamw_ema_", TORCH_BOX(&njepa::adamw_ema_));
  m.impl("add_layer_norm_forward", TORCH_BOX(&njepa::add_layer_norm_forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&njepa::add_layer_norm_backward));
  m.impl("bias_gelu_forward", TORCH_BOX(&njepa::bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&njepa::bias_gelu_backward));
}

STABLE_TORCH_LIBRARY_IMPL(njepa_native, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&njepa::version));
  m.impl("instruction_sets", TORCH_BOX(&njepa::instruction_sets));
  m.impl("use_instruction_set", TORCH_BOX(&njepa::use_instruction_set));
  m.impl("token_normals", TORCH_BOX(&njepa::token_normals));
}
