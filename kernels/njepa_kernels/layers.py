"""The ops as layers with a forward and nothing else.

``njepa_kernels.nn`` adds the constructors. Hugging Face's ``kernels`` puts these forwards into
other classes (``LocalLayerRepository(path, layer_name="PredictionLoss")``), which must then have
the attributes annotated here; ``Encoder`` and ``Predictor`` read those of the published modules.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from ._runtime.dispatch import Impl
from ._runtime.philox import NoiseKey
from .integrations._forwards import Masks, as_list, encode, predict
from .ops.gather_tokens.op import gather_tokens
from .ops.jepa_loss.op import jepa_loss
from .ops.jepa_loss.reference import JepaLoss, Stop
from .ops.predictor_tokens.op import predictor_tokens
from .ops.vicreg.op import vicreg
from .ops.vicreg.reference import VicregTerms


class GatherTokens(nn.Module):
    """``njepa_kernels.gather_tokens``."""

    can_torch_compile = True
    impl: Impl

    def forward(
        self, x: torch.Tensor, idx: torch.Tensor, pos: torch.Tensor | None = None
    ) -> torch.Tensor:
        return gather_tokens(x, idx, pos, impl=self.impl)


class PredictorTokens(nn.Module):
    """``njepa_kernels.predictor_tokens`` with the module's own mask token and position table."""

    can_torch_compile = True
    mask_token: torch.Tensor
    pos: torch.Tensor
    impl: Impl

    def forward(
        self,
        context: torch.Tensor,
        context_idx: torch.Tensor,
        target_idx: torch.Tensor,
        sigma: torch.Tensor | None = None,
        noise: NoiseKey | None = None,
    ) -> torch.Tensor:
        return predictor_tokens(
            context,
            self.pos,
            self.mask_token,
            context_idx,
            target_idx,
            sigma,
            noise,
            impl=self.impl,
        )


class PredictionLoss(nn.Module):
    """``njepa_kernels.jepa_loss``."""

    can_torch_compile = True
    noise_weight: float
    consistency: float
    consistency_stop: Stop
    beta: float
    eps: float
    impl: Impl

    def forward(
        self,
        pred: torch.Tensor,
        h: torch.Tensor,
        target_idx: torch.Tensor,
        noised: torch.Tensor | None = None,
    ) -> JepaLoss:
        return jepa_loss(
            pred,
            h,
            target_idx,
            noised,
            noise_weight=self.noise_weight,
            consistency=self.consistency,
            consistency_stop=self.consistency_stop,
            beta=self.beta,
            eps=self.eps,
            impl=self.impl,
        )


class VICReg(nn.Module):
    """``njepa_kernels.vicreg``."""

    can_torch_compile = True
    gamma: float
    eps: float
    group: dist.ProcessGroup | None
    impl: Impl

    def forward(self, u: torch.Tensor) -> VicregTerms:
        return vicreg(u, self.gamma, self.eps, self.group, impl=self.impl)


class Encoder(nn.Module):
    """The forward of an encoder in the published style; see ``integrations.accelerate``."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor, masks: Masks | None = None) -> torch.Tensor:
        out: torch.Tensor = encode(self, x, None if masks is None else as_list(masks), "auto")
        return out


class Predictor(nn.Module):
    """The forward of a predictor in the published style; see ``integrations.accelerate``."""

    can_torch_compile = True

    def forward(self, x: torch.Tensor, masks_x: Masks, masks: Masks) -> torch.Tensor:
        out: torch.Tensor = predict(self, x, as_list(masks_x), as_list(masks), "auto")
        return out
