"""What a training step needs of an engine, and the plain one: torch alone, one process.

``njepa.training.zero`` is the other one: DeepSpeed behind the same interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from njepa.config import OptimConfig
from njepa.data.batch import Batch
from njepa.training.fused_update import FusedAdamW
from njepa.training.health import gate, skip_where
from njepa.training.module import TrainModule, adamw
from njepa.training.schedules import Rates
from njepa.training.sharding import Sharding


class Update(NamedTuple):
    """What became of an optimizer step."""

    bad: Tensor
    """bool, 0-dim, the same on all ranks: nothing was updated, the gradient was not finite."""
    norm: Tensor
    """0-dim: global L2 norm of the gradient before clipping; not finite where ``bad``."""
    norms: Tensor | None = None
    """The same of each parameter with a gradient, where this rank holds them whole."""


class Engine(Protocol):
    """Forward, backward and update of a module, wherever its parameters lie."""

    @property
    def module(self) -> TrainModule: ...

    @property
    def fused(self) -> FusedAdamW | None:
        """The optimizer, where its step moves the target encoder, too."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of ``forward``, for what runs outside of the module."""
        ...

    def forward(self, batch: Batch, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a micro-batch; see ``TrainModule.forward``."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch to the mean over those of the step."""
        ...

    def update(self, rates: Rates) -> Update:
        """Clip and apply the gradient of the step, unless it is not finite; forget it."""
        ...

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[list[Tensor]]:
        """Whole parameters in their best precision, to read only. Collective."""
        ...


class PlainEngine:
    """Autocast, clipping and fused AdamW in one process, on the device alone; needs no DeepSpeed.

    Gradients are clipped as DeepSpeed does it, to ``clipping / (norm + 1e-6)`` of themselves where
    that is less than 1, with DeepSpeed's bits on a CPU.

    Attributes:
        stage: of ZeRO, for checkpoints: nothing is cut up.
        between_steps: no micro-batch of an unfinished step has been taken, where a step has one.
    """

    stage, between_steps = 0, True

    def __init__(
        self,
        module: TrainModule,
        optim: OptimConfig,
        device: torch.device,
        *,
        low: bool = False,
        accumulation: int = 1,
        clipping: float = 0.0,
    ) -> None:
        """``low``: bf16 autocast. ``accumulation``: micro-batches of a step.

        ``clipping``: limit of the gradient's norm; 0: none.
        """
        self.module, self._device, self._low = module.to(device), device, low
        self._accumulation, self._clipping = accumulation, clipping
        self.optimizer = adamw(self.module, optim)
        self.fused = self.optimizer if isinstance(self.optimizer, FusedAdamW) else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._low)

    def forward(self, batch: Batch, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast():
            loss, metrics = self.module(batch, h)
        return loss, metrics

    def backward(self, loss: Tensor) -> None:
        gate(loss if self._accumulation == 1 else loss / self._accumulation).backward()

    def update(self, rates: Rates) -> Update:
        rates.write(self.optimizer.param_groups)
        norm, norms = gradient_norms(self.module)
        bad = ~norm.isfinite()
        skip_where(self.optimizer, bad)
        if self._clipping:
            total = norms.square().sum().sqrt()  # DeepSpeed sums in this order
            self._clip((self._clipping / (total + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Update(bad, norm, norms)

    def _clip(self, factor: Tensor) -> None:
        if self.fused is not None:
            self.fused.scale = factor
            return
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, factor)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        yield list(parameters)

    def sharding(self) -> Sharding:
        """What of the weights and moments lies on this rank, for checkpoints: everything."""
        return Sharding(self, self.module, self.stage)

    def close(self) -> None:
        """Nothing stays behind."""


def gradient_norms(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Global L2 norm of gradients that every rank holds whole, and that of each, on the device.

    The first has the bits of ``torch.nn.utils.get_total_norm``.
    """
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norms = torch.stack(list(torch._foreach_norm(grads)))
    return torch.linalg.vector_norm(norms), norms
