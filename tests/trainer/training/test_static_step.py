"""A step from buffers has the bits of an ordinary one, and bakes nothing that changes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from njepa_kernels._runtime import dispatch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from njepa.config import Config
from njepa.data.batch import Batch, Masks
from njepa.models.attention import SDPA
from njepa.models.encoder import build_encoder
from njepa.training.ema import low_target, make_target
from njepa.training.engine import PlainEngine
from njepa.training.module import TrainModule
from njepa.training.schedules import Rates, Schedules
from njepa.training.static_step import StaticStep, owned
from njepa.training.step import StepResult, TrainState, training_step
from tests.support.broken_steps import KINDS
from tests.support.host_reads import READS
from tests.support.tiny import make_batch, tiny_config

CPU = torch.device("cpu")
METHODS = ("ijepa", "cjepa", "njepa", "ncjepa")
#: Shapes in the order in which they come: each again, after another.
COUNTS = ((10, 5), (8, 5), (10, 3), (10, 5), (8, 5))
OTHERS = {
    "tied": {"noise": {"space": "encoder_tied", "mask_token": "shared"}},
    "shared": {"noise": {"predictors": "shared", "draw": "shared"}},
    "edm": {"noise": {"predictors": "single", "sigma": "edm"}},
}


class Breakable(PlainEngine):
    """The plain engine, whose next loss can be broken."""

    kind: str | None = None

    def forward(self, batch, h):
        loss, metrics = super().forward(batch, h)
        return (KINDS[self.kind](loss) if self.kind else loss), metrics


def configured(method: str, **sections) -> Config:
    return tiny_config(method, optim={"fused_update": True}, **sections)


def build(config: Config, low: bool = False, clipping: float = 0.5) -> TrainState:
    module = TrainModule(config)
    target = make_target(module.jepa.encoder)
    engine = Breakable(module, config.optim, CPU, low=low, clipping=clipping)
    return TrainState(engine, target, low=low_target(target) if low else None)


def batch_of(config: Config, step: int) -> Batch:
    batch, (kept, wanted) = make_batch(config, step=step), COUNTS[step % len(COUNTS)]
    context, target, _ = batch.masks
    masks = Masks(context[:, :kept].clone(), target[..., :wanted].clone())
    return batch._replace(masks=masks, cut_frac=step / 100)


def kept(state: TrainState) -> list[torch.Tensor]:
    """All that a step changes."""
    engine = state.engine
    moments = [x for of in engine.optimizer.state.values() for x in of.values()]
    trained = [*engine.module.parameters(), *engine.module.buffers()]
    return [*trained, *moments, *state.target.parameters(), *(state.copies or ())]


def numbers(result: StepResult) -> list[torch.Tensor]:
    update, (seen,) = result
    return [*update, *seen.metrics.values(), seen.features, seen.sample_ids, *seen.masks[:2]]


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_twenty_steps_have_the_bits_of_ordinary_ones(method: str, low: bool):
    config = configured("ncjepa", **OTHERS[method]) if method in OTHERS else configured(method)
    ordinary, still = build(config, low), build(config, low)
    static, schedules = StaticStep(still), Schedules(config.optim, 20, 4)
    every: list[tuple[StepResult, StepResult]] = []
    for step in range(20):
        for state in (ordinary, still):
            state.engine.kind = "gradient" if step in (7, 8) else None
        batch, rates = batch_of(config, step), schedules.at(step)
        want = training_step(ordinary, [batch], rates)
        result = static.step(static.load(batch, rates))
        every.append((want, owned(result, batch)))
    assert [bool(want.update.bad) for want, _ in every] == [i in (7, 8) for i in range(20)]
    for want, got in every:
        assert got.micro_batches[0].cut_frac == want.micro_batches[0].cut_frac
        for a, b in zip(numbers(want), numbers(got), strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    assert all(map(torch.equal, kept(still), kept(ordinary)))
    first, last = (every[i][0].micro_batches[0].metrics["loss"] for i in (0, -1))
    assert first != last


class Recorder(TorchDispatchMode):
    """What a graph would bake: operators, their numbers, and which memory they are given."""

    def __init__(self, lasting: dict[int, str]) -> None:
        super().__init__()
        self.calls, self._lasting = list[str](), lasting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.calls.append(f"{func}{self._told(args)}{self._told(kwargs or {})}")
        return out

    def _told(self, value) -> str:
        if isinstance(value, torch.Tensor):
            name = self._lasting.get(id(value), "temporary")
            return f"{name} {value.dtype} {list(value.shape)} {value.stride()}"
        if isinstance(value, dict):
            value = list(value.items())
        if isinstance(value, list | tuple):
            return f"({', '.join(map(self._told, value))})"
        return repr(value)


def record(state: TrainState, buffers: list[torch.Tensor], step) -> list[str]:
    lasting = {id(x): f"#{i}" for i, x in enumerate([*kept(state), *buffers])}
    with Recorder(lasting) as recorder:
        step()
    return recorder.calls


def as_on_a_gpu():
    """Patches under which the ops take Triton's way, and a state of tensors without values."""
    found = {(op, "triton", "cpu"): "yes" for op in dispatch.OPS}
    return mock.patch.dict(dispatch._found, found), FakeTensorMode(allow_non_fake_inputs=True)


def fake_state(config: Config, low: bool) -> TrainState:
    with mock.patch("torch.nn.init.trunc_normal_"):  # it looks at what it drew
        module = TrainModule(config)
        target = build_encoder(config).eval().requires_grad_(False)
    with mock.patch.object(module, "to", return_value=module):  # a fake one cannot be moved
        engine = PlainEngine(module, config.optim, CPU, low=low, clipping=0.5)
    copies = low_target(target) if low else None
    return TrainState(engine, target, SDPA, "triton", low=copies)


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_two_steps_are_the_same_operators_on_the_same_memory(method: str, low: bool):
    """Without values, nothing can be read on the host: a read would raise here."""
    sections = OTHERS.get(method, {}) | {"impl": {"default": "triton"}}
    config = configured("ncjepa" if method in OTHERS else method, **sections)
    patched, fake = as_on_a_gpu()
    schedules = Schedules(config.optim, 20, 4)
    with patched, fake:
        state = fake_state(config, low)
        static = StaticStep(state)
        runs, shapes = list[list[str]](), []
        for step in (0, 5, 10, 11):
            shapes.append(static.load(batch_of(config, step), schedules.at(step)))
            own = static._batches[shapes[-1]]
            noise = [] if own.noise is None else [own.noise.sigma, *own.noise.key[1:3]]
            buffers = [own.images, *own.masks[:2], *static._numbers, *noise]
            shape = shapes[-1]
            runs.append(record(state, buffers, lambda shape=shape: static.step(shape)))
    assert shapes[0] == shapes[1] == shapes[2] != shapes[3]
    assert runs[1] == runs[2] != runs[3]  # the first one makes the optimizer's state
    assert len(runs[1]) > 200
    names = {call.split("(")[0].split(".")[1] for call in runs[1]}
    assert names & READS == {"lift_fresh"}
    # The weight decay of those that have none: a number of the host for encoder and for the rest.
    assert sum("lift_fresh" in call for call in runs[1]) == 2
    used = {f"#{i} " for i in range(len(kept(state)), len(kept(state)) + len(buffers))}
    assert used == {mark for mark in used if any(mark in call for call in runs[1])}


def test_an_ordinary_step_bakes_the_numbers_of_its_own():
    """The recorder sees what a graph would repeat wrongly: rates, and the step of the noise."""
    config = configured("njepa", impl={"default": "triton"})
    patched, fake = as_on_a_gpu()
    with patched, fake:
        state = fake_state(config, False)
        training_step(state, [batch_of(config, 0)], Rates(1e-3, 0.1, 0.9))
        batch = batch_of(config, 5)
        rates = Rates(1e-3, 0.1, 0.9)
        runs = [
            record(state, [], lambda b=b, r=r: training_step(state, [b], r))
            for b, r in (
                (batch, rates),
                (batch, rates),
                (batch_of(config, 10), rates),
                (batch, rates._replace(lr=2e-3)),
            )
        ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert any("predictor_tokens" in a for a, b in zip(runs[0], runs[2], strict=True) if a != b)


def test_other_micro_batches_are_refused():
    config = configured("njepa")
    static = StaticStep(build(config))
    rates = Rates(1e-3, 0.1, 0.9)
    batch = batch_of(config, 0)
    static.load(batch, rates)
    with pytest.raises(ValueError, match=r"\[4, 48, 48, 3\] with noise, got \[2, 48, 48, 3\]"):
        static.load(make_batch(config, batch=2), rates)
    with pytest.raises(ValueError, match=r"like its first one.*without noise"):
        static.load(batch._replace(noise=None), rates)
    other = batch.noise._replace(key=batch.noise.key._replace(seed=5))
    with pytest.raises(ValueError, match=r"keeps its seed, \d+, got 5"):
        static.load(batch._replace(noise=other), rates)


@pytest.mark.parametrize("fused", [False, True])
def test_the_plain_engine_clips_as_torch_does(fused: bool):
    config = tiny_config("ncjepa", optim={"fused_update": fused})
    states = [build(config, clipping=0.05), build(config, clipping=0.0)]
    rates = Rates(1e-2, 0.1, 0.9)
    for step in range(3):
        norm = training_step(states[0], [batch_of(config, step)], rates).update.norm
        assert norm > 0.05
        other = states[1].engine
        clipped = torch.nn.utils.clip_grad_norm_
        update = other.optimizer.step

        def clip_first(update=update, other=other, clipped=clipped):
            clipped(other.module.parameters(), 0.05)
            update()

        with mock.patch.object(other.optimizer, "step", clip_first):
            training_step(states[1], [batch_of(config, step)], rates)
    for got, want in zip(kept(states[0]), kept(states[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
