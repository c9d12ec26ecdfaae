"""Schedules against a stateful oracle that steps before use, as the published ones do."""

from __future__ import annotations

import math

import pytest

from njepa.config import ConfigError, OptimConfig
from njepa.training.schedules import Schedules


class Oracle:
    """Counters that advance at every step, and a momentum generator."""

    def __init__(self, optim: OptimConfig, steps: int, warmup: int) -> None:
        self.o, self.warmup, self.t = optim, warmup, 0
        self.period = int(optim.schedule_scale * steps)
        self.momenta = (
            optim.ema[0] + i * (optim.ema[1] - optim.ema[0]) / self.period
            for i in range(self.period + 1)
        )

    def step(self) -> tuple[float, float, float]:
        self.t += 1
        o = self.o
        if self.t < self.warmup:
            lr = o.lr_start + self.t / max(1, self.warmup) * (o.lr - o.lr_start)
        elif o.lr_shape == "constant":
            lr = o.lr
        else:
            progress = (self.t - self.warmup) / max(1, self.period - self.warmup)
            lr = o.lr_final + (o.lr - o.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))
            lr = max(o.lr_final, lr)
        wd = o.weight_decay_final + (o.weight_decay - o.weight_decay_final) * 0.5 * (
            1 + math.cos(math.pi * self.t / self.period)
        )
        if o.weight_decay_final <= o.weight_decay:
            wd = max(o.weight_decay_final, wd)
        else:
            wd = min(o.weight_decay_final, wd)
        return lr, wd, next(self.momenta)


@pytest.mark.parametrize(
    ("options", "steps", "warmup"),
    [
        ({}, 600, 15),
        ({"schedule_scale": 1.25, "lr_start": 2e-4}, 300, 40),
        ({"weight_decay": 0.4, "weight_decay_final": 0.04}, 50, 0),
        ({"ema": (0.9, 0.99)}, 7, 7),
        ({"lr_shape": "constant", "schedule_scale": 1.25}, 100, 40),
        ({}, 1, 0),
    ],
)
def test_every_step_matches_the_oracle(options: dict[str, object], steps: int, warmup: int):
    optim = OptimConfig(**options)
    schedules, oracle = Schedules(optim, steps, warmup), Oracle(optim, steps, warmup)
    for step in range(steps):
        assert tuple(schedules.at(step)) == pytest.approx(oracle.step(), rel=1e-14)


def test_values_at_the_corners():
    """ViT-H/14 as published: lr 2e-4 -> 1e-3 -> 1e-6, wd .04 -> .4, momentum .996 -> 1."""
    optim = OptimConfig(lr_start=2e-4, lr=1e-3, lr_final=1e-6)
    total, warmup = 300, 40
    schedules = Schedules(optim, total, warmup)
    assert schedules.at(0).lr == pytest.approx(2e-4 + 8e-4 / 40)
    assert schedules.at(warmup - 2).lr == pytest.approx(2e-4 + 8e-4 * 39 / 40)
    assert schedules.at(warmup - 1).lr == pytest.approx(1e-3, rel=1e-15)
    middle = (total + warmup) // 2
    assert schedules.at(middle - 1).lr == pytest.approx((1e-3 + 1e-6) / 2)
    assert schedules.at(total - 1).lr == pytest.approx(1e-6)
    assert schedules.at(total // 2 - 1).weight_decay == pytest.approx(0.22)
    assert schedules.at(total - 1).weight_decay == pytest.approx(0.4)
    assert schedules.at(0).momentum == 0.996
    assert schedules.at(total // 2).momentum == pytest.approx(0.998)
    assert schedules.at(total - 1).momentum == pytest.approx(1 - 0.004 / total)  # 1 is not reached


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_a_constant_rate_stays_after_the_warm_up(scale: float):
    """N-JEPA, section 4.4: 1e-4 -> 1e-3 in 40 epochs, then 1e-3 to the end of 100."""
    total, warmup = 100, 40
    values = {"lr_start": 1e-4, "lr": 1e-3, "schedule_scale": scale}
    constant = Schedules(OptimConfig(**values, lr_shape="constant"), total, warmup)
    assert constant.at(0).lr == pytest.approx(1e-4 + 9e-4 / 40, rel=1e-15)  # t = 1
    assert constant.at(warmup - 2).lr == pytest.approx(1e-4 + 9e-4 * 39 / 40, rel=1e-15)
    assert constant.at(warmup - 1).lr == 1e-3  # t = W
    assert {constant.at(step).lr for step in range(warmup - 1, total)} == {1e-3}  # to t = T
    cosine = Schedules(OptimConfig(**values), total, warmup)
    assert cosine.at(total - 1).lr < 2e-4
    for step in range(total):  # nothing else moves
        assert constant.at(step)[1:] == cosine.at(step)[1:]
    for step in range(warmup):
        assert constant.at(step).lr == cosine.at(step).lr
    floor = Schedules(OptimConfig(**values, lr_shape="constant", lr_final=0.5), total, warmup)
    assert [floor.at(step).lr for step in range(total)] == [
        constant.at(step).lr for step in range(total)
    ]


def test_order_of_calls_is_irrelevant():
    schedules = Schedules(OptimConfig(), 100, 10)
    forward = [schedules.at(step) for step in range(100)]
    assert [schedules.at(step) for step in reversed(range(100))] == forward[::-1]


def test_refusals():
    with pytest.raises(ConfigError, match=r"got 11 warm-up steps of 10.*warmup_epochs"):
        Schedules(OptimConfig(), 10, 11)
    with pytest.raises(ConfigError, match="at least 1 step"):
        Schedules(OptimConfig(), 0, 0)
    for step in (-1, 10):
        with pytest.raises(ValueError, match=rf"\[0, 10\), got {step}"):
            Schedules(OptimConfig(), 10, 0).at(step)
