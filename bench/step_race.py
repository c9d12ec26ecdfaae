"""Whole steps side by side: variants of one step on the same weights, images and masks.

What ``bench_step.py`` and ``profile_step.py`` share.
"""

from __future__ import annotations

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
from bench.measure import ceilings, synchronise
from bench.our_step import RATES, OurStep
from bench.published.masks import PublishedCollator
from bench.published.step import Phase, PublishedStep, no_phase
from bench.step_sizes import (
    STATIC,
    VARIANTS,
    Case,
    needed_bytes,
    parse_case,
    published_size,
    step_config,
)
from njepa import planning
from njepa.data.batch import Batch, Masks
from njepa.draws.masks import MaskSampler
from njepa.training.compiling import compilations
from njepa.training.module import TrainModule

PHASES = ("data", "target", "context", "predictor", "loss", "backward", "optimizer", "EMA")
#: Shapes that a race with static masks meets at most: each is compiled for each such variant.
SHAPES = 4
#: Steps from one wait for the device to the next: the trainer lets the host run ahead, too.
STEPS = {"cuda": 4, "cpu": 1}


class Inputs(NamedTuple):
    """The same batch for both sides."""

    batch: Batch
    """With the bytes that njepa's loader delivers, [B, S, S, 3]."""
    normalised: Tensor
    """What the published loader delivers: fp32 [B, 3, S, S]."""


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


class Runner:
    """One variant: its step, and where its masks come from."""

    def __init__(
        self, name: str, case: Case, weights: dict[str, Tensor], device: torch.device
    ) -> None:
        variant = VARIANTS[name]
        self.name, self.device, self.same = name, device, variant.same
        self.low = low = variant.low or device.type == "cuda"
        self.config = step_config(case, variant.overrides or ())
        before = memory(device)
        self._published: PublishedStep | None = None
        self._ours: OurStep | None = None
        if variant.overrides is None:
            mask = self.config.mask
            self.collate = PublishedCollator(
                self.config.grid, mask.n_targets, mask.target_scale, mask.context_scale,
                mask.aspect_ratio, mask.min_keep,
            )  # fmt: skip
            self._published = PublishedStep(
                published_size(self.config), weights, device, low, variant.compiled,
                **RATES._asdict(),
            )  # fmt: skip
        else:
            self._ours = OurStep(self.config, weights, device, low)
        self.resident, self.peak = memory(device) - before, 0
        self.graphs = 0
        self.steps = STEPS[device.type]
        self.seconds: list[float] = []

    def step(self, inputs: Inputs, phase: Phase = no_phase) -> Tensor:
        before, batch = compilations(), inputs.batch
        if self._published is not None:
            masks = [batch.masks.context_idx], list(batch.masks.target_idx.unbind(1))
            loss = self._published(inputs.normalised, *masks, phase)
        else:
            assert self._ours is not None
            loss = self._ours(batch, phase)
        self.graphs += compilations() - before
        return loss

    def draw(self, number: int, batch: int, sampler: MaskSampler) -> None:
        """Masks as this variant's loader draws them, on the host: timed, not used."""
        if self._published is not None:
            self.collate(batch)
        else:
            sampler(number, np.arange(batch, dtype=np.int64))

    def timed(self, inputs: Inputs) -> None:
        """Some steps on the clock; the peak without what other variants keep."""
        synchronise(self.device)
        held = memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        for _ in range(self.steps):
            self.step(inputs)
        synchronise(self.device)
        self.seconds.append((time.perf_counter() - start) / self.steps)
        if self.device.type == "cuda":
            above = torch.cuda.max_memory_allocated(self.device) - held
            self.peak = max(self.peak, above + self.resident)

    def choices(self) -> dict[str, str]:
        """What the trainer would say it runs; nothing for the published step."""
        if self._ours is None:
            return {}
        return {"attention": str(self._ours.attention), "compile": str(self._ours.compilation)}


def memory(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Race:
    """All variants of one size: checked, warmed up, timed in turns, then by phase.

    A step begins with the batch on the device and ends with the target encoder updated. Its masks
    are those of njepa's sampler for every variant, new in each round, with static shapes if one of
    the variants has them; drawing them is a phase of its own ("data"), outside of the step, because
    both sides draw them beside the training. Every variant has met every shape before it is timed.

    ``mfu`` is useful FLOPs over the rate of one large matrix product in the same run.

    Raises:
        ValueError: the variants do not fit into the GPU's memory together.
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
        """``warmup``: steps for each shape. ``only``: names of ``VARIANTS``; None: all."""
        names = only or list(VARIANTS)
        self.case, self.device = parse_case(name), device
        if device.type == "cuda" and self.case.batch is not None:
            check_memory(self.case, names, True, torch.cuda.mem_get_info(device)[0])
        self.static = any(VARIANTS[variant].static for variant in names)
        self.config = step_config(self.case, (STATIC,) if self.static else ())
        weights = {k: v.clone() for k, v in TrainModule(self.config).jepa.state_dict().items()}
        self.runners = {variant: Runner(variant, self.case, weights, device) for variant in names}
        types = {True: torch.bfloat16, False: torch.float32}
        self.ceilings = {
            low: ceilings(device, types[low]).flops
            for low in {r.low for r in self.runners.values()}
        }
        self._check(self.case.batch or 16)
        self.batch = self.case.batch or self._largest_batch()
        self.sampler = self._sampler(self.batch)
        self.images = self._images(self.batch)
        self.shapes: list[planning.Shape] = []
        numbers = self._step_numbers(rounds)
        self._warm_up(numbers, warmup)
        for turn, number in enumerate(numbers):
            self._round(turn, number)
        self.phases = {name: self._phases(r, phase_steps) for name, r in self.runners.items()}

    def _sampler(self, batch: int) -> MaskSampler:
        return MaskSampler(self.config.mask, self.config.grid, self.config.run.seed, batch)

    def _step_numbers(self, rounds: int) -> list[int]:
        """Steps whose masks are used: the first ones; static masks of the first few shapes."""
        if not self.static:
            return list(range(rounds))
        numbers: list[int] = []
        sizes, number = set(), 0
        while len(numbers) < rounds:
            size = self.sampler.block_sizes(number)
            if size in sizes or len(sizes) < SHAPES:
                sizes.add(size)
                numbers.append(number)
            number += 1
        return numbers

    def _warm_up(self, numbers: list[int], steps: int) -> None:
        first: dict[planning.Shape, Inputs] = {}
        for number in numbers:
            inputs = self.inputs(number, self.images)
            first.setdefault(shape_of(inputs), inputs)
        for runner in self.runners.values():
            for inputs in first.values():
                for _ in range(steps):
                    runner.step(inputs)

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
        self.sampler = self._sampler(batch)
        losses, inputs = {}, self.inputs(0, self._images(batch))
        for name, runner in self.runners.items():
            before = memory(self.device)
            losses[name] = runner.step(inputs).item()
            runner.resident += memory(self.device) - before
        for low, limit in ((False, 1e-5), (True, 2e-2)):
            same = [
                x for n, x in losses.items() if self.runners[n].same and self.runners[n].low == low
            ]
            middle = statistics.median(same or [0.0])
            assert all(abs(x - middle) <= limit * middle for x in same), losses

    def _round(self, turn: int, number: int) -> None:
        inputs = self.inputs(number, self.images)
        self.shapes.append(shape_of(inputs))
        names = list(self.runners)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            self.runners[name].timed(inputs)

    def _phases(self, runner: Runner, steps: int) -> dict[str, float]:
        """Milliseconds by phase, means over some steps; waiting makes their sum exceed a step."""
        clock = PhaseClock(self.device)
        for number in self._step_numbers(steps):
            with clock("data"):
                runner.draw(number, self.batch, self.sampler)
            runner.step(self.inputs(number, self.images), clock)
        return {name: 1e3 * seconds / steps for name, seconds in clock.seconds.items()}

    def _largest_batch(self) -> int:
        """The largest power of two from 16 on at which every variant makes a step."""
        best, batch = 0, 16
        while True:
            try:
                self.sampler = self._sampler(batch)
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
            "dtype": "bf16 autocast" if runner.low else "fp32",
            "impl": name,
            "mode": "step",
            "images_per_s": self.batch / seconds,
            "phases": self.phases[name],
            "tokens_per_s": self.batch * self.config.grid[0] ** 2 / seconds,
            "peak_bytes": runner.peak or None,
            "flops": flops,
            "mfu": flops / seconds / self.ceilings[runner.low],
            "mfu_nominal": flops / seconds / nominal if nominal else None,
            "compilations": runner.graphs,
            "rounds": len(runner.seconds),
            "clock": f"wall, {runner.steps} steps",
            "masks": "static" if self.static else "drawn",
            "shapes": len(set(self.shapes)),
            "timm": timm.__version__,
            "matmul_ceiling": self.ceilings[runner.low],
            **runner.choices(),
            **machine(self.device),
        }  # fmt: skip
        for other in ("eager", "compile", "eager-bf16", "compile-bf16"):
            if other in self.runners:
                pairs = zip(self.runners[other].seconds, runner.seconds, strict=True)
                row[f"faster_than_{other}"] = statistics.median(a / b for a, b in pairs)
        return row


def shape_of(inputs: Inputs) -> planning.Shape:
    batch = inputs.batch
    return planning.Shape(*(idx.shape[-1] for idx in batch.masks[:2]))


def check_memory(case: Case, names: list[str], low: bool, free: float) -> None:
    """Raises ValueError where a race of ``names`` needs more than 95 % of ``free`` bytes."""
    needed = needed_bytes(case, names, low)
    if needed > 0.95 * free:
        raise ValueError(
            f"{', '.join(names)} at {case.name} need {needed / 2**30:.0f} GiB together, but "
            f"{free / 2**30:.0f} GiB are free; race fewer at a time "
            f"(NJEPA_BENCH_STEP_VARIANTS={','.join(names[:2])}), or a smaller batch"
        )


def nominal_flops(device: torch.device) -> float | None:
    """The vendor's dense bf16 number, for GPUs that ``njepa plan`` knows."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu.flops for key, gpu in planning.GPUS.items() if key in name), None)
