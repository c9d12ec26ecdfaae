"""The I-JEPA step composed as the published code composes it: the opponent of ``bench_step.py``.

The networks of ``networks.py``, an average of weights parameter by parameter, four optimizer
groups, GradScaler with CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.published.networks import PublishedEncoder, PublishedPredictor, published_targets

Phase = Callable[[str], AbstractContextManager[Any]]


def no_phase(name: str) -> AbstractContextManager[Any]:
    """Marks nothing: for steps that are timed as a whole."""
    return nullcontext()


class Size(NamedTuple):
    image: int
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    predictor_width: int
    predictor_depth: int
    predictor_heads: int


def optimizer_groups(encoder: nn.Module, predictor: nn.Module) -> list[dict[str, Any]]:
    """Weights, then biases and norms, of either network; the latter two without decay."""
    groups = []
    for plain in (False, True):
        for module in (encoder, predictor):
            chosen = [
                p for name, p in module.named_parameters()
                if ("bias" in name or p.dim() == 1) == plain
            ]  # fmt: skip
            groups.append({"params": chosen, **({"weight_decay": 0.0} if plain else {})})
    return groups


class PublishedStep:
    """Encoder, predictor, target encoder, optimizer; a call is a step and returns its loss.

    Args:
        state: weights by published names, ``encoder.*`` and ``predictor.*``.
        low: bf16 autocast.
        compiled: ``torch.compile`` of the three networks, shapes dynamic where they change.
    """

    def __init__(
        self, size: Size, state: dict[str, Tensor], device: torch.device, low: bool, compiled: bool,
        lr: float = 1e-4, weight_decay: float = 0.04, momentum: float = 0.996,
    ) -> None:  # fmt: skip
        self.device, self.low, self.momentum = device, low, momentum
        side = size.image // size.patch
        self.encoder = PublishedEncoder(
            side, size.patch, size.width, size.depth, size.heads, size.hidden
        )
        self.predictor = PublishedPredictor(
            side, size.width, size.predictor_width, size.predictor_depth, size.predictor_heads
        )
        for name in ("encoder", "predictor"):
            part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)}
            getattr(self, name).load_state_dict(part)
        self.encoder.to(device)
        self.predictor.to(device)
        self.target = deepcopy(self.encoder).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            optimizer_groups(self.encoder, self.predictor), lr=lr, weight_decay=weight_decay
        )
        self.scaler = torch.amp.GradScaler("cuda") if low and device.type == "cuda" else None
        self._networks = (self.encoder, self.predictor, self.target)
        if compiled:
            self._networks = tuple(torch.compile(network) for network in self._networks)

    def loss(
        self, images: Tensor, context: list[Tensor], targets: list[Tensor], phase: Phase = no_phase
    ) -> Tensor:
        encoder, predictor, target = self._networks
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            with phase("target"):
                h = published_targets(target, images, context, targets)
            with phase("context"):
                z = encoder(images, context)
            with phase("predictor"):
                p = predictor(z, context, targets)
            with phase("loss"):
                return F.smooth_l1_loss(p, h)

    def __call__(
        self, images: Tensor, context: list[Tensor], targets: list[Tensor], phase: Phase = no_phase
    ) -> Tensor:
        loss = self.loss(images, context, targets, phase)
        with phase("backward"):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        with phase("optimizer"):
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.optimizer.zero_grad()
        with phase("EMA"), torch.no_grad():
            for q, k in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
                k.data.mul_(self.momentum).add_((1.0 - self.momentum) * q.detach().data)
        return loss.detach()
