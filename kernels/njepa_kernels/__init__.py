"""njepa_kernels: the fused operations of joint-embedding predictive pre-training.

Needs torch and nothing else. Every op takes ``impl="auto"``; ``available_impls()`` says what runs.
"""

from . import integrations, layers, nn
from ._runtime.checks import debug_checks
from ._runtime.dispatch import Impl, available_impls, choose
from ._runtime.philox import NoiseKey, philox4x32, philox_normal
from ._version import __version__
from .ops.adamw_ema_.op import adamw_ema_
from .ops.add_layer_norm.op import add_layer_norm
from .ops.add_layer_norm.reference import AddLayerNorm
from .ops.bias_gelu.op import bias_gelu
from .ops.ema_update_.op import ema_update_
from .ops.gather_tokens.op import gather_tokens
from .ops.jepa_loss.op import jepa_loss
from .ops.jepa_loss.reference import JepaLoss
from .ops.patchify.op import patchify
from .ops.predictor_tokens.op import predictor_tokens
from .ops.vicreg.op import vicreg
from .ops.vicreg.reference import VicregTerms

__all__ = [
    "AddLayerNorm",
    "Impl",
    "JepaLoss",
    "NoiseKey",
    "VicregTerms",
    "__version__",
    "adamw_ema_",
    "add_layer_norm",
    "available_impls",
    "bias_gelu",
    "choose",
    "debug_checks",
    "ema_update_",
    "gather_tokens",
    "integrations",
    "jepa_loss",
    "layers",
    "nn",
    "patchify",
    "philox4x32",
    "philox_normal",
    "predictor_tokens",
    "vicreg",
]
