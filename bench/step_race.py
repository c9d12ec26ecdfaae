"""Whole steps side by side: variants of one step on the same weights, images and masks.

What ``bench_step.py`` and ``profile_step.py`` share. DeepSpeed is not needed: our step is
``TrainModule``, torch's AdamW and the EMA, put together as ``njepa/loop.py`` does.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor

from bench.facts import machine
from bench.published_step import Phase, PublishedCollator, PublishedStep, Size, no_phase
from njepa import planning
from njepa.config import Config, PredictorConfig, RunConfig, load_config
from njepa.data.batch import Batch, Masks
from njepa.draws.masks import MaskSampler
from njepa.ema import ema_parameters, make_target, update_target
from njepa.step import TrainModule, param_groups

#: Encoder and depth of the predictor by the letter in a size's name (published depths).
LETTERS = {
    "s": ("vit_small", 6),
    "b": ("vit_base", 6),
    "l": ("vit_large", 12),
    "h": ("vit_huge", 12),
}
PHASES = ("data", "target", "context", "predictor", "loss", "backward", "optimizer", "EMA")
_RATES = {"lr": 1e-4, "weight_decay": 0.04}
_MOMENTUM = 0.996
_NAME = re.compile(r"vit([sblh])(\d+)-(\d+)-b(\d+|max)")


class Case(NamedTuple):
    """A size as in ``vits16-224-b8``: encoder and patch, pixels, images in a batch."""

    name: str
    overrides: tuple[str, ...]
    batch: int | None
    """None: the largest power of two that every variant can hold."""


def parse_case(name: str) -> Case:
    """Read a size.

    Raises:
        ValueError: not of the form ``vit<s|b|l|h><patch>-<pixels>-b<batch|max>``.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"a step size must look like vits16-224-b8 or vitl16-224-bmax, got {name!r}"
        )
    letter, patch, pixels, batch = match.groups()
    encoder, depth = LETTERS[letter]
    overrides = (
        f"model.encoder={encoder}", f"model.patch_size={patch}", f"data.image_size={pixels}",
        f"model.predictor.depth={depth}",
    )  # fmt: skip
    return Case(name, overrides, None if batch == "max" else int(batch))


class Inputs(NamedTuple):
    """The same batch for both sides."""

    batch: Batch
    """With the bytes that njepa's loader delivers, [B, S, S, 3]."""
    normalised: Tensor
    """What the published loader delivers: fp32 [B, 3, S, S]."""


class Variant(NamedTuple):
    overrides: tuple[str, ...] | None
    """Of our configuration; None: the published composition."""
    compiled: bool
    same: bool
    """Whether it computes what the published step computes."""


def variants() -> dict[str, Variant]:
    """What can run here; options of the configuration are taken up where they exist."""
    found = {
        "eager": Variant(None, compiled=False, same=True),
        "compile": Variant(None, compiled=True, same=True),
        "reference": Variant(("impl.default=reference",), compiled=False, same=True),
        "auto": Variant((), compiled=False, same=True),
    }
    if "context" in PredictorConfig.model_fields:
        found["shared"] = Variant(("model.predictor.context=shared",), compiled=False, same=False)
    if "compile" in RunConfig.model_fields:
        found["blocks"] = Variant(("run.compile=blocks",), compiled=True, same=True)
    return found


class OurStep:
    """A step of njepa; a call is a step and returns its loss."""

    def __init__(
        self, config: Config, state: dict[str, Tensor], device: torch.device, low: bool
    ) -> None:
        self.device, self.low, self.impl = device, low, config.impl.default
        self.module = TrainModule(config)
        self.module.jepa.load_state_dict(state)
        self.target = make_target(self.module.jepa.encoder).to(device)
        if getattr(config.run, "compile", "off") == "blocks":
            from njepa.compilation import compile_blocks

            compile_blocks((self.module, self.target), config.mask.static_shapes)
        self.online = ema_parameters(self.module.to(device).jepa.encoder)
        self.optimizer = torch.optim.AdamW(
            param_groups(self.module, _RATES["weight_decay"]),
            lr=_RATES["lr"],
            fused=device.type == "cuda",
        )

    def __call__(self, batch: Batch, phase: Phase = no_phase) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            with torch.no_grad(), phase("target"):
                h = self.target(batch.images)
            with self._marked(phase):
                loss, _ = self.module(batch, h)
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with phase("EMA"):
            update_target(self.target, self.online, _MOMENTUM, impl=self.impl)
        return loss.detach()

    @contextmanager
    def _marked(self, phase: Phase) -> Iterator[None]:
        """Phases inside of the module's forward, whose code knows of none: by hooks."""
        if phase is no_phase:
            yield
            return
        running: list[Any] = []

        def enter(name: str) -> None:
            running.append(phase(name))
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


class PhaseClock:
    """Seconds by phase; the device is waited for at both ends of each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] += time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Runner:
    """One variant: its step, and where its masks come from."""

    def __init__(
        self, name: str, case: Case, weights: dict[str, Tensor], device: torch.device, low: bool
    ) -> None:
        variant = variants()[name]
        self.name, self.device, self.same = name, device, variant.same
        self.config = step_config(case, variant.overrides or ())
        self.sampler = MaskSampler(self.config.mask, self.config.grid, self.config.run.seed)
        before = memory(device)
        self._published: PublishedStep | None = None
        self._ours: OurStep | None = None
        if variant.overrides is None:
            mask = self.config.mask
            self.collate = PublishedCollator(
                self.config.grid[0], mask.n_targets, mask.target_scale, mask.context_scale,
                mask.aspect_ratio, mask.min_keep,
            )  # fmt: skip
            self._published = PublishedStep(
                published_size(self.config), weights, device, low, variant.compiled, **_RATES,
                momentum=_MOMENTUM,
            )  # fmt: skip
        else:
            self._ours = OurStep(self.config, weights, device, low)
        self.resident, self.peak = memory(device) - before, 0
        self.graphs = 0
        self.seconds: list[float] = []

    def step(self, inputs: Inputs, phase: Phase = no_phase) -> Tensor:
        before, batch = _graphs(), inputs.batch
        if self._published is not None:
            masks = [batch.masks.context_idx], list(batch.masks.target_idx.unbind(1))
            loss = self._published(inputs.normalised, *masks, phase)
        else:
            assert self._ours is not None
            loss = self._ours(batch, phase)
        self.graphs += _graphs() - before
        return loss

    def draw(self, number: int, batch: int) -> None:
        """Masks of this variant's own sampler, on the host: timed, not used."""
        if self._published is not None:
            self.collate(batch)
        else:
            self.sampler(number, np.arange(batch, dtype=np.int64))

    def timed(self, inputs: Inputs) -> None:
        """One step on the clock; the peak without what other variants keep."""
        synchronise(self.device)
        held = memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        self.step(inputs)
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - start)
        if self.device.type == "cuda":
            above = torch.cuda.max_memory_allocated(self.device) - held
            self.peak = max(self.peak, above + self.resident)


def memory(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _graphs() -> int:
    """Graphs that dynamo compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def step_config(case: Case, overrides: tuple[str, ...] = ()) -> Config:
    return load_config("in1k-vitb16", ["data.path=.", "method=ijepa", *case.overrides, *overrides])


def published_size(config: Config) -> Size:
    net = planning.network(config)
    e, p = net.encoder, net.predictor
    return Size(
        config.data.image_size, config.model.patch_size, e.width, e.depth, e.heads, e.hidden,
        p.width, p.depth, p.heads,
    )  # fmt: skip


class Race:
    """All variants of one size: checked, then timed in interleaved rounds, then by phase.

    A step begins with the batch on the device and ends with the target encoder updated. Its masks
    are those of njepa's sampler for every variant, new in each round; drawing them is a phase of
    its own ("data"), outside of the step, because both sides draw them beside the training.

    ``mfu`` is useful FLOPs over the rate of one large matrix product in the same run.

    Raises:
        AssertionError: variants of the same mathematics disagree in their first loss.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        rounds: int,
        warmup: int,
        phase_steps: int,
        only: list[str] | None = None,
    ) -> None:
        """``only``: names of ``variants()``; None: all that can run here."""
        self.case, self.device = parse_case(name), device
        self.low = device.type == "cuda"
        self.config = step_config(self.case)
        weights = {k: v.clone() for k, v in TrainModule(self.config).jepa.state_dict().items()}
        self.runners = {
            variant: Runner(variant, self.case, weights, device, self.low)
            for variant in only or variants()
        }
        self.sampler = MaskSampler(self.config.mask, self.config.grid, self.config.run.seed)
        self._check(self.case.batch or 16)
        self.batch = self.case.batch or self._largest_batch()
        self.images = self._images(self.batch)
        self.shapes: list[planning.Shape] = []
        for number in range(warmup):
            for runner in self.runners.values():
                runner.step(self.inputs(number, self.images))
        for number in range(warmup, warmup + rounds):
            self._round(number)
        self.phases = {name: self._phases(r, phase_steps) for name, r in self.runners.items()}
        self.ceiling = matmul_ceiling(device, self.low)

    def _images(self, batch: int) -> Tensor:
        side = self.config.data.image_size
        noise = torch.Generator().manual_seed(0)
        shape = (batch, side, side, 3)
        return torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8).to(self.device)

    def inputs(self, number: int, images: Tensor) -> Inputs:
        """The images with the masks of a step."""
        ids, data = np.arange(len(images), dtype=np.int64), self.config.data
        drawn = self.sampler(number, ids)
        indices = drawn.context_idx, drawn.target_idx
        context, target = (torch.from_numpy(x).to(self.device) for x in indices)
        mean, std = (torch.tensor(x, device=self.device) for x in (data.mean, data.std))
        normalised = ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        masks = Masks(context, target)
        return Inputs(Batch(images, masks, None, torch.from_numpy(ids), number), normalised)

    def _check(self, batch: int) -> None:
        """First steps: equal losses where the mathematics is equal; optimizers get their state."""
        losses, inputs = {}, self.inputs(0, self._images(batch))
        for name, runner in self.runners.items():
            before = memory(self.device)
            losses[name] = runner.step(inputs).item()
            runner.resident += memory(self.device) - before
        same = [loss for name, loss in losses.items() if self.runners[name].same]
        middle, limit = statistics.median(same), 2e-2 if self.low else 1e-5
        assert all(abs(x - middle) <= limit * middle for x in same), losses

    def _round(self, number: int) -> None:
        inputs = self.inputs(number, self.images)
        counts = [idx.shape[-1] for idx in inputs.batch.masks[:2]]
        self.shapes.append(planning.Shape(*counts))
        names = list(self.runners)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            self.runners[name].timed(inputs)

    def _phases(self, runner: Runner, steps: int) -> dict[str, float]:
        """Milliseconds by phase, means over some steps; waiting makes their sum exceed a step."""
        clock = PhaseClock(self.device)
        for number in range(steps):
            with clock("data"):
                runner.draw(number, self.batch)
            runner.step(self.inputs(number, self.images), clock)
        return {name: 1e3 * seconds / steps for name, seconds in clock.seconds.items()}

    def _largest_batch(self) -> int:
        """The largest power of two from 16 on at which every variant makes a step."""
        best, batch = 0, 16
        while True:
            try:
                for runner in self.runners.values():
                    runner.step(self.inputs(0, self._images(batch)))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if not best:
                    raise
                return best
            best, batch = batch, 2 * batch

    def row(self, name: str) -> dict[str, Any]:
        """``extra_info`` of a variant."""
        runner = self.runners[name]
        seconds = statistics.median(runner.seconds)
        flops = statistics.median(
            sum(f.total for f in planning.step_flops(runner.config, shape, self.batch).values())
            for shape in self.shapes
        )
        nominal = nominal_flops(self.device)
        size = self.case.name.rsplit("-b", 1)[0] + f"-b{self.batch}"
        row: dict[str, Any] = {
            "op": "step",
            "size": size,
            "dtype": "bf16 autocast" if self.low else "fp32",
            "impl": name,
            "mode": "step",
            "images_per_s": self.batch / seconds,
            "phases": self.phases[name],
            "tokens_per_s": self.batch * self.config.grid[0] ** 2 / seconds,
            "peak_bytes": runner.peak or None,
            "flops": flops,
            "mfu": flops / seconds / self.ceiling,
            "mfu_nominal": flops / seconds / nominal if nominal else None,
            "compilations": runner.graphs,
            "rounds": len(runner.seconds),
            "timm": timm.__version__,
            "matmul_ceiling": self.ceiling,
            **machine(self.device),
        }  # fmt: skip
        for other in ("eager", "compile"):
            if other in self.runners:
                pairs = zip(self.runners[other].seconds, runner.seconds, strict=True)
                row[f"faster_than_{other}"] = statistics.median(a / b for a, b in pairs)
        return row


def matmul_ceiling(device: torch.device, low: bool) -> float:
    """FLOP/s of one large matrix product, the best of several runs."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if low else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def nominal_flops(device: torch.device) -> float | None:
    """The vendor's dense bf16 number, for GPUs that ``njepa plan`` knows."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu.flops for key, gpu in planning.GPUS.items() if key in name), None)
