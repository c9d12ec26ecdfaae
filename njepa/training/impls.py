"""Which implementation runs for each fused op of a training."""

from __future__ import annotations

import torch
from njepa_kernels import choose

from njepa.choice import Choice
from njepa.config import Config, ConfigError

#: The fused ops of every step; VICReg's is the fifth.
OPS = ("patchify", "predictor_tokens", "jepa_loss", "ema_update_")
#: Those of ``model.fused_block``.
BLOCK_OPS = ("add_layer_norm", "bias_gelu")


def choose_impls(config: Config, device: torch.device) -> dict[str, Choice]:
    """The implementation that will run for each op of this training.

    Raises:
        ConfigError: ``impl.default`` asks for one that cannot run here; says why.
    """
    wanted = config.impl.default
    reason = "the first that runs here" if wanted == "auto" else "as configured"
    try:
        ops = [*OPS, *(("vicreg",) if config.vicreg.weight > 0 else ())]
        ops += BLOCK_OPS if config.model.fused_block else ()
        ops += ("adamw_ema_",) if config.optim.fused_update else ()
        return {op: Choice(choose(op, wanted, device), reason) for op in ops}
    except RuntimeError as error:
        raise ConfigError(f"impl.default={wanted}: {error}") from None
