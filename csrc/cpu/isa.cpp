// All kernels for one instruction set; compiled once for each, see setup.py.
#include "adamw_ema.h"
#include "add_layer_norm.h"
#include "bias_gelu.h"
#include "ema_update.h"
#include "gather_tokens.h"
#include "jepa_loss.h"
#include "kernels.h"
#include "patchify.h"
#include "predictor_tokens.h"
#include "vicreg.h"

#define NJEPA_TEXT(name) NJEPA_TEXT_(name)
#define NJEPA_TEXT_(name) #name

namespace njepa::NJEPA_ISA {

const Kernels& kernels() {
  static constexpr Kernels table = {
      .name = NJEPA_TEXT(NJEPA_ISA),
      .panel = kPanel,
      .patchify = patchify,
      .gather_forward = gather_forward,
      .gather_backward = gather_backward,
      .gather_backward_pos = gather_backward_pos,
      .predictor_forward = predictor_forward,
      .predictor_backward_context = predictor_backward_context,
      .predictor_backward_targets = predictor_backward_targets,
      .predictor_backward_pos = predictor_backward_pos,
      .jepa_loss = jepa_loss,
      .scale = scale,
      .vicreg_moments = vicreg_moments,
      .vicreg_pack = vicreg_pack,
      .gram = gram,
      .vicreg_backward = vicreg_backward,
      .ema = ema,
      .adamw_ema = adamw_ema,
      .add_layer_norm = add_layer_norm,
      .add_layer_norm_backward = add_layer_norm_backward,
      .bias_gelu = bias_gelu,
      .bias_gelu_backward = bias_gelu_backward,
      .normals = normals,
  };
  return table;
}

}  // namespace njepa::NJEPA_ISA
