"""Every operator of one training step, run without data: what a GPU would be told to do.

The trainer's own step runs on tensors that have shapes and types only, so the list is that of the
code as it is. It runs as on the CPU of a machine without a GPU, with two differences: the fused
ops are those of a GPU (one operator each), and attention is torch's flash kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from njepa_kernels import NoiseKey
from njepa_kernels._runtime import dispatch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from njepa.config import Config
from njepa.data.batch import Batch, Masks, Noise
from njepa.models.attention import Attention
from njepa.models.attention import Sequences as SequenceLayout
from njepa.models.encoder import build_encoder
from njepa.planning.module_paths import ModulePaths
from njepa.planning.network import Shape
from njepa.planning.operators import Cost, operator_cost, tensors
from njepa.training.ema import low_target
from njepa.training.engine import PlainEngine, Update
from njepa.training.module import TrainModule
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, encode_with, training_step

_RATES = Rates(lr=1e-4, weight_decay=0.04, momentum=0.996)


@dataclass(frozen=True)
class Flash:
    """Attention as the operator that SDPA takes on a GPU."""

    name = "flash"
    packs = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sequences: SequenceLayout) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*heads)[0]
        return out.transpose(1, 2)


FLASH = Attention(Flash(), Flash())


@dataclass(frozen=True)
class Operator:
    """One operator of the step that moves something."""

    name: str
    """As ``aten.addmm``."""
    phase: str
    """As ``context encoder``."""
    backward: bool
    module: str
    """Path of the innermost module, as ``TrainModule.jepa.encoder.blocks.0.mlp.fc1``."""
    cost: Cost
    inputs: tuple[int, ...]
    """Elements of each tensor that it gets."""
    outputs: tuple[int, ...]


class _Recorder(TorchDispatchMode):
    """Notes operators with what they cost, the phase and the module that they are of."""

    def __init__(self, modules: ModulePaths) -> None:
        super().__init__()
        self.modules, self.phase, self.backward = modules, "", False
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # The momentum, which stays a tensor on a GPU; "is a first weight out of range?"
            return False if args[0].dtype == torch.bool else _RATES.momentum
        module = self.modules.at_operator()
        out = func(*args, **(kwargs or {}))
        if self.phase:
            cost = operator_cost(func, args, kwargs or {}, out)
            if cost.launches:
                self._note(func, module, cost, (args, kwargs), out)
        return out

    def _note(self, func: Any, module: str, cost: Cost, given: Any, out: Any) -> None:
        name = str(func._overloadpacket)
        phase = self.phase if self.phase != "module" else _phase_of(name, module)
        numbers = (tuple(t.numel() for t in tensors(x)) for x in (given, out))
        self.operators.append(Operator(name, phase, self.backward, module, cost, *numbers))

    @contextmanager
    def at(self, phase: str, backward: bool = False) -> Iterator[None]:
        before = self.phase, self.backward
        self.phase, self.backward = phase, backward
        try:
            yield
        finally:
            self.phase, self.backward = before


class _Engine(PlainEngine):
    """The plain engine; tells the recorder where it is."""

    recorder: _Recorder

    def forward(self, batch: Batch, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self.recorder.at("module"):
            return super().forward(batch, h)

    def backward(self, loss: Tensor) -> None:
        with self.recorder.at("module", backward=True):
            super().backward(loss)

    def update(self, rates: Rates) -> Update:
        with self.recorder.at("optimizer"):
            return super().update(rates)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        with self.recorder.at("EMA"), super().whole(parameters) as whole:
            yield whole


class _State(TrainState):
    """Tells the recorder what follows the average."""

    recorder: _Recorder

    def refresh(self) -> None:
        with self.recorder.at("EMA"):
            super().refresh()


def trace_step(
    config: Config, shape: Shape, batch: int, low: bool, attention: Attention = FLASH
) -> list[Operator]:
    """All operators of a step of one micro-batch on one rank, in their order.

    Args:
        shape: tokens of every context and every target block.
        low: bf16 autocast; else fp32.
        attention: what runs in place of the flash kernel.
    """
    config = config.model_copy(
        update={"impl": config.impl.model_copy(update={"default": "triton"})}
    )
    gpu_ops = mock.patch.dict(
        dispatch._found, {(op, "triton", "cpu"): "yes" for op in dispatch.OPS}
    )
    modules = ModulePaths()
    recorder = _Recorder(modules)
    # On a GPU the norm of the gradient is a few kernels over lists.
    lists = mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True)
    with gpu_ops, lists, FakeTensorMode(allow_non_fake_inputs=True), recorder:
        module = TrainModule(config, attention=attention)
        target = build_encoder(config, attention).eval().requires_grad_(False)
        with mock.patch.object(module, "to", return_value=module):  # a fake one cannot be moved
            engine = _Engine(module, config.optim, torch.device("cpu"), low=low)
        for parameter in module.parameters():  # the moments are there from the second step on
            engine.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        engine.recorder = recorder

        def encode(images: Tensor) -> Tensor:
            with recorder.at("target encoder"):
                return encode_with(engine, state.running, images)

        copies = low_target(target, fp8=config.model.target_dtype == "fp8") if low else None
        state = _State(engine, target, attention, "triton", encode, copies)
        state.recorder = recorder
        with modules, recorder.at("monitors"):
            training_step(state, [_batch(config, shape, batch)], _RATES)
    return recorder.operators


def _batch(config: Config, shape: Shape, batch: int) -> Batch:
    side, blocks = config.data.image_size, config.mask.n_targets
    ids, noise = torch.zeros(batch, dtype=torch.int64), None
    if config.noise.active:
        shared = config.noise.draw == "shared"
        noise = Noise(torch.zeros(batch, blocks), NoiseKey(0, 0, ids, shared))
    masks = Masks(
        torch.zeros(batch, shape.context, dtype=torch.int64),
        torch.zeros(batch, blocks, shape.target, dtype=torch.int64),
    )
    images = torch.zeros(batch, side, side, 3, dtype=torch.uint8)
    return Batch(images, masks, noise, ids, 0)


def _phase_of(name: str, module: str) -> str:
    if name.startswith("njepa.vicreg") or ".projector" in module:
        return "vicreg"
    for part, phase in (
        ("jepa.encoder", "context encoder"),
        ("jepa.noise_predictor", "noise predictor"),
        ("jepa.predictor", "predictor"),
    ):
        if part in module:
            return phase
    return "loss"
