"""One optimizer step: the page that the trainer, the benchmarks and the tests all run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from njepa_kernels import Impl
from torch import Tensor, nn

from njepa.data.batch import Batch, Masks
from njepa.models.attention import SDPA, Attention
from njepa.models.encoder import Encoder
from njepa.training.ema import LowTarget, ema_parameters, held_where, update_target
from njepa.training.engine import Engine, Update
from njepa.training.schedules import Rates


@dataclass
class TrainState:
    """All that a step reads and changes."""

    engine: Engine
    target: Encoder
    """fp32, outside of the engine, whole on every rank."""
    attention: Attention = SDPA
    impl: Impl = "auto"
    """Of the target's update."""
    target_forward: Callable[[Tensor], Tensor] | None = None
    """What runs instead of the target's forward, such as its CUDA graph."""
    low: LowTarget | None = None
    """With bf16 autocast: what runs as the target."""
    online: list[nn.Parameter] = field(init=False)
    """What the target follows."""
    buffers: list[Tensor] = field(init=False)
    """Statistics of batch norm, the only thing that a forward pass changes."""

    def __post_init__(self) -> None:
        self.online = ema_parameters(self.engine.module.jepa.encoder)
        self.buffers = list(self.engine.module.buffers())
        if self.engine.fused is not None:
            targets = [p.detach() for p in ema_parameters(self.target)]
            self.engine.fused.follow(self.online, targets, self.copies, self.impl)

    @property
    def running(self) -> Encoder:
        """The encoder that computes the target's features."""
        return self.target if self.low is None else self.low.encoder

    @property
    def copies(self) -> list[Tensor] | None:
        """What every update of the target writes in bf16."""
        return None if self.low is None else self.low.copies

    def refresh(self) -> None:
        """What is made of the copies follows them, once a step."""
        if self.low is not None:
            self.low.refresh()

    def encode(self, images: Tensor) -> Tensor:
        """Target features [B, N, D], without gradient."""
        if self.target_forward is not None:
            return self.target_forward(images)
        return encode_with(self.engine, self.running, images)


class MicroBatch(NamedTuple):
    """What is kept of a micro-batch, on the device."""

    masks: Masks
    cut_frac: float
    metrics: dict[str, Tensor]
    features: Tensor
    """[B, D], fp32: target features, averaged over the patches."""
    sample_ids: Tensor


class StepResult(NamedTuple):
    update: Update
    micro_batches: list[MicroBatch]


def training_step(state: TrainState, batches: Iterable[Batch], rates: Rates) -> StepResult:
    """Train on the micro-batches of one step; reads nothing on the host.

    A step whose loss or gradient is not finite on any rank changes nothing on all of them: weights,
    moments, buffers and target keep their bits, and ``update.bad`` says so.
    """
    engine, seen = state.engine, list[MicroBatch]()
    before = [buffer.clone() for buffer in state.buffers]
    with state.attention.ordered():
        for batch in batches:
            h = state.encode(batch.images)
            loss, metrics = engine.forward(batch, h)
            engine.backward(loss)
            pooled = h.float().mean(1)
            seen.append(MicroBatch(batch.masks, batch.cut_frac, metrics, pooled, batch.sample_ids))
        if engine.fused is not None:
            engine.fused.momentum = rates.momentum
        update = engine.update(rates)
    for buffer, old in zip(state.buffers, before, strict=True):
        buffer.copy_(torch.where(update.bad, old, buffer))
    if engine.fused is None:
        momentum = held_where(update.bad, rates.momentum)
        with engine.whole(state.online) as online:
            update_target(state.target, online, momentum, state.impl, state.copies)
    state.refresh()
    return StepResult(update, seen)


@torch.no_grad()
def encode_with(engine: Engine, encoder: Encoder, images: Tensor) -> Tensor:
    """Features of all patches, [B, N, D], in the precision of the engine."""
    with engine.autocast():
        features: Tensor = encoder(images)
    return features
