"""The ops as modules, each with its own ``impl``. B batch, N patches, M target blocks, D, d widths.

    gather = nn.GatherTokens()                         # the context encoder's kept patches
    tokens = nn.PredictorTokens(384, pos=table)        # the predictor's input; owns mask_token
    loss = nn.PredictionLoss()                         # smooth-L1 to layer-normed targets
    terms = nn.VICReg()                                # invariance, variance, covariance
    ema = nn.Ema(target_encoder, encoder)              # target <- m target + (1 - m) encoder

The functions (``njepa_kernels.gather_tokens``, ...) have the full contract of arguments and errors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import layers
from ._runtime.dispatch import IMPLEMENTATIONS, Impl
from .ops.ema_update_.op import ema_update_
from .ops.jepa_loss.reference import Stop

__all__ = ["Ema", "GatherTokens", "PredictionLoss", "PredictorTokens", "VICReg"]


def _known(who: str, impl: Impl) -> Impl:
    if impl not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"{who}: impl must be one of {known}, got {impl!r}")
    return impl


class GatherTokens(layers.GatherTokens):
    """x[b, idx] + pos[idx]: x [B, N, D], idx int64 [B, K] or [B, M, K] -> [B, (M,) K, D].

    ``pos`` [N, D] is optional. The op: ``njepa_kernels.gather_tokens``.
    """

    def __init__(self, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.impl = _known("GatherTokens", impl)

    def extra_repr(self) -> str:
        return f"impl={self.impl!r}"


class PredictorTokens(layers.PredictorTokens):
    """The predictor's input, ``[B, Kc, d] -> [M*B, Kc + Kt, d]``, row ``m*B + b``.

        out[m*B + b, :Kc]    = context[b] + pos[context_idx[b]]
        out[m*B + b, Kc + t] = mask_token + pos[j] + sigma[b, m] n,  j = target_idx[b, m, t]

    ``forward(context, context_idx, target_idx, sigma=None, noise=None)`` with sigma [B, M] and
    ``noise=NoiseKey(seed, step, sample_ids)``. The op: ``njepa_kernels.predictor_tokens``.

    Args:
        width: d.
        pos: [N, d], the position table. A tensor becomes a buffer (it is in the state dict and gets
            no gradient), an ``nn.Parameter`` stays one.
        impl: which implementation runs.

    ``mask_token`` [d] is a parameter, drawn from N(0, 0.02^2) cut at 2 (facebookresearch/ijepa,
    src/models/vision_transformer.py; there it has the shape [1, 1, d]). It is made on the device
    and in the type of ``pos``.

    Raises:
        TypeError, ValueError: a table of other type or shape, an unknown ``impl``.
    """

    def __init__(self, width: int, pos: torch.Tensor, *, impl: Impl = "auto") -> None:
        super().__init__()
        if not isinstance(pos, torch.Tensor) or not pos.is_floating_point():
            kind = pos.dtype if isinstance(pos, torch.Tensor) else type(pos).__name__
            raise TypeError(
                f"PredictorTokens: pos must be a floating torch.Tensor [N,d], got {kind}"
            )
        if pos.dim() != 2 or pos.shape[1] != width:
            raise ValueError(
                f"PredictorTokens: pos must be [N,d] = [any, {width}], got {list(pos.shape)}"
            )
        self.impl = _known("PredictorTokens", impl)
        if isinstance(pos, nn.Parameter):
            self.pos = pos
        else:
            self.register_buffer("pos", pos.detach().clone())
        self.mask_token = nn.Parameter(torch.empty(width, device=pos.device, dtype=pos.dtype))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def extra_repr(self) -> str:
        n, width = self.pos.shape
        return f"width={width}, n_patches={n}, impl={self.impl!r}"


class PredictionLoss(layers.PredictionLoss):
    """smooth_l1_beta(pred - LayerNorm(h)[target_idx]), and the terms of a noised prediction.

    ``forward(pred, h, target_idx, noised=None)`` with pred and noised ``[M*B, Kt, D]`` in rows
    ``m*B + b``, h [B, N, D], target_idx int64 [B, M, Kt]; returns ``JepaLoss(loss, clean, noised,
    consistency)``: scalars, fp32. The op: ``njepa_kernels.jepa_loss``.

    Args:
        noise_weight, consistency: weights of the loss of ``noised`` and of its distance to
            ``pred``, >= 0.
        consistency_stop: "clean" or "noised", which of the two is a constant in the distance.
        beta: where the square meets the line, >= 0; eps: of the LayerNorm, > 0.
        impl: which implementation runs.
    """

    def __init__(
        self,
        *,
        noise_weight: float = 0.1,
        consistency: float = 0.1,
        consistency_stop: Stop = "none",
        beta: float = 1.0,
        eps: float = 1e-5,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.noise_weight = noise_weight
        self.consistency = consistency
        self.consistency_stop = consistency_stop
        self.beta = beta
        self.eps = eps
        self.impl = _known("PredictionLoss", impl)

    def extra_repr(self) -> str:
        return (
            f"noise_weight={self.noise_weight}, consistency={self.consistency}, "
            f"consistency_stop={self.consistency_stop!r}, beta={self.beta}, eps={self.eps}, "
            f"impl={self.impl!r}"
        )


class VICReg(layers.VICReg):
    """The three terms of VICReg (arXiv 2105.04906) of u [n, D] or [M, n, D], unweighted.

    Returns ``VicregTerms(inv, std, cov)``, fp32 scalars; the paper weighs them 25, 25, 1. The op:
    ``njepa_kernels.vicreg``.

    Args:
        gamma: the standard deviation below which the hinge pushes; eps: under its root.
        group: a process group whose ranks share the batch, or None.
        impl: which implementation runs.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        eps: float = 1e-4,
        group: dist.ProcessGroup | None = None,
        *,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.eps = eps
        self.group = group
        self.impl = _known("VICReg", impl)

    def extra_repr(self) -> str:
        shared = "" if self.group is None else f"ranks={dist.get_world_size(self.group)}, "
        return f"gamma={self.gamma}, eps={self.eps}, {shared}impl={self.impl!r}"


class Ema(nn.Module):
    """target <- m target + (1 - m) source for every parameter, in fp32 and in place.

        ema = Ema(target_encoder, encoder)
        ema.update_(0.996)              # instead of the loop over the parameters
        h = ema(images)                 # target_encoder(images), without autograd

    ``target`` is a submodule (keys "target.*"); ``source`` is only looked at and appears neither in
    the state dict nor among the parameters. Either may be wrapped (DDP). Buffers are left alone, as
    in the published loop (facebookresearch/ijepa, src/train.py). The op:
    ``njepa_kernels.ema_update_``.

    Raises:
        TypeError: a parameter of ``target`` is not fp32: in bf16 an average near m = 1 stands
            still.
        ValueError: the two have not the same number and shapes of parameters.
    """

    def __init__(self, target: nn.Module, source: nn.Module, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.impl = _known("Ema", impl)
        names = [name for name, _ in target.named_parameters()]
        targets, sources = list(target.parameters()), list(source.parameters())
        if len(targets) != len(sources):
            raise ValueError(
                f"Ema: source must have the {len(targets)} parameters of target, got {len(sources)}"
            )
        for name, mine, other in zip(names, targets, sources, strict=True):
            if mine.dtype != torch.float32:
                raise TypeError(f"Ema: target.{name} must be float32, got {mine.dtype}")
            if mine.shape != other.shape:
                raise ValueError(
                    f"Ema: source's counterpart of {name} must be {list(mine.shape)}, "
                    f"got {list(other.shape)}"
                )
        self.target = target
        # In a tuple, so that nn.Module does not register it.
        self._source = (source,)

    def update_(self, momentum: float | torch.Tensor) -> None:
        """One step with m = ``momentum`` in [0, 1]; parameters are looked up again each time."""
        targets, sources = self.target.parameters(), self._source[0].parameters()
        ema_update_(list(targets), list(sources), momentum, impl=self.impl)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"impl={self.impl!r}"
