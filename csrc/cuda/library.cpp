// The library as a whole: its ops, and where their tensors are.
#include "ops.h"

#ifdef NJEPA_EMULATED
#define NJEPA_LIBRARY njepa_native_emulated
#define NJEPA_KEY CPU
#else
#define NJEPA_LIBRARY njepa_native_cuda
#define NJEPA_KEY CUDA
#endif

namespace njepa {

#ifdef NJEPA_EMULATED
bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
const char* const kPlace = "CPU";
#else
bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }
const char* const kPlace = "CUDA";
#endif

static std::string version() { return NJEPA_VERSION; }

}  // namespace njepa

STABLE_TORCH_LIBRARY(NJEPA_LIBRARY, m) {
  m.def("version() -> str");
  njepa::define_common_ops(m);
  m.def(
      "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, float rest, "
      "Tensor? rates, Tensor(b!)[] shadow) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(NJEPA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&njepa::version));
}

STABLE_TORCH_LIBRARY_IMPL(NJEPA_LIBRARY, NJEPA_KEY, m) {
  njepa::implement_common_ops(m);
  m.impl("ema_update_", TORCH_BOX(&njepa::ema_update_));
}
