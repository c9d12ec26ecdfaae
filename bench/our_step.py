"""Our side of a race: the trainer's ``training_step`` on the plain engine, without DeepSpeed.

With the attention and the compilation that the trainer chooses here; it says where it is, so that a
profile can tell the phases apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.published.step import Phase, no_phase
from njepa.config import Config
from njepa.data.batch import Batch
from njepa.models.architecture import architecture
from njepa.models.attention_kernels import choose_attention
from njepa.training.compiling import choose_compilation, compile_blocks
from njepa.training.ema import low_target, make_target
from njepa.training.engine import PlainEngine, Update
from njepa.training.module import TrainModule
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, encode_with, training_step

#: Of every step, and of the published one.
RATES = Rates(lr=1e-4, weight_decay=0.04, momentum=0.996)


class PhasedEngine(PlainEngine):
    """The plain engine; says where it is, to whom ``phase`` is not ``no_phase``."""

    phase: Phase = staticmethod(no_phase)

    def forward(self, batch: Batch, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self._marked():
            return super().forward(batch, h)

    def backward(self, loss: Tensor) -> None:
        with self.phase("backward"):
            super().backward(loss)

    def update(self, rates: Rates) -> Update:
        with self.phase("optimizer"):
            return super().update(rates)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        with self.phase("EMA"), super().whole(parameters) as whole:
            yield whole

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Phases inside of the module's forward, whose code knows of none: by hooks."""
        if self.phase is no_phase:
            yield
            return
        running: list[Any] = []

        def enter(name: str) -> None:
            running.append(self.phase(name))
            running[-1].__enter__()

        def leave() -> None:
            running.pop().__exit__(None, None, None)

        jepa = self.module.jepa
        hooks = [
            jepa.encoder.register_forward_pre_hook(lambda *_: enter("context")),
            jepa.encoder.register_forward_hook(lambda *_: leave()),
            jepa.predictor.register_forward_pre_hook(lambda *_: enter("predictor")),
            jepa.predictor.register_forward_hook(lambda *_: (leave(), enter("loss"))[0]),
        ]
        try:
            yield
        finally:
            leave()
            for hook in hooks:
                hook.remove()


class OurStep:
    """A step of njepa; a call is a step and returns its loss."""

    def __init__(
        self, config: Config, state: dict[str, Tensor], device: torch.device, low: bool
    ) -> None:
        parts = architecture(config)
        widths = {part.width // part.heads for part in (parts.encoder, parts.predictor)}
        dtype = torch.bfloat16 if low else torch.float32
        self.attention = choose_attention(config.model, config.mask, widths, device, dtype)
        self.compilation = choose_compilation(config, zero_stage=0, device=device)
        module = TrainModule(config, attention=self.attention)
        module.jepa.load_state_dict(state)
        target = make_target(module.jepa.encoder).to(device)
        copies = low_target(target) if low else None
        running = target if copies is None else copies.encoder
        if self.compilation.name == "blocks":
            compile_blocks((module, running), config.mask.static_shapes)
        self.engine = PhasedEngine(module, config.optim, device, low=low)
        self.module, self.target = module, target

        def encode(images: Tensor) -> Tensor:
            with self.engine.phase("target"):
                return encode_with(self.engine, running, images)

        self.state = TrainState(
            self.engine, target, self.attention, config.impl.default, encode, copies
        )

    def __call__(self, batch: Batch, phase: Phase = no_phase) -> Tensor:
        self.engine.phase = phase
        return training_step(self.state, [batch], RATES).micro_batches[0].metrics["loss"]
