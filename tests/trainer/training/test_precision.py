"""What `torch_autocast: auto` means on any CPU, by injected facts and clocks, and on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from njepa.choice import Choice
from njepa.config import ConfigError
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.models.architecture import architecture
from njepa.models.block import Block
from njepa.training import precision
from njepa.training.precision import (
    block_trial,
    choose_precision,
    interleaved,
    matrix_units,
    recorded_precision,
)
from tests.support.jobs import make_images, run_jobs
from tests.support.tiny import tiny_config

AUTO = parse_deepspeed({"torch_autocast": {"enabled": "auto"}})
ON = parse_deepspeed({"torch_autocast": {"enabled": True}})
OFF = parse_deepspeed({"torch_autocast": {"enabled": False}})
PURE = parse_deepspeed({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}})


def never() -> tuple[float, float]:
    raise AssertionError("the trial was not needed")


def choose(ds=AUTO, device="cpu", times=None, recorded=None, units=None) -> Choice:
    return choose_precision(ds, device, never if times is None else lambda: times, recorded, units)


def test_auto_needs_matrix_units_and_a_trial_that_is_won():
    none = choose()
    assert none == ("fp32", "no AMX or AVX512-BF16: bf16 would not be faster")
    won = choose(times=(0.059, 0.031), units="AMX")
    assert won == ("torch_autocast", "bf16 by AMX: a block takes 31 ms in bf16, 59 ms in fp32")
    lost = choose(times=(0.031, 0.03), units="AVX512-BF16")
    assert lost == ("fp32", "AVX512-BF16, but a block takes 30 ms in bf16, 31 ms in fp32")
    assert choose(device="cuda") == ("torch_autocast", "bf16 on CUDA")


@pytest.mark.parametrize(("ds", "name"), [(ON, "torch_autocast"), (OFF, "fp32"), (PURE, "bf16")])
def test_what_the_file_says_is_done_without_a_trial(ds, name):
    for device in ("cpu", "cuda"):
        assert choose(ds, device, units="AMX") == (name, "as configured")
        assert choose(ds, device, units="AMX", recorded=name) == (name, "as configured")


def test_a_run_keeps_the_precision_it_began_with():
    for device in ("cpu", "cuda"):
        for name in ("fp32", "torch_autocast"):
            assert choose(device=device, units="AMX", recorded=name) == (name, "as the run began")
    with pytest.raises(
        ConfigError, match=r"computed in fp32, .* now asks for torch_autocast: .*new"
    ):
        choose(ON, recorded="fp32")
    with pytest.raises(ConfigError, match=r"with bf16 weights, .*restore bf16\.enabled"):
        choose(recorded="bf16")


def test_a_checkpoint_that_does_not_say_is_that_of_its_device(tmp_path: Path):
    state = tmp_path / "state.json"
    state.write_text('{"step": 3}')
    assert recorded_precision(tmp_path, AUTO, "cpu") == "fp32"
    assert recorded_precision(tmp_path, AUTO, "cuda") == "torch_autocast"
    assert recorded_precision(tmp_path, ON, "cpu") == "torch_autocast"
    assert recorded_precision(tmp_path, OFF, "cuda") == "fp32"
    state.write_text('{"precision": "bf16"}')
    assert recorded_precision(tmp_path, AUTO, "cpu") == "bf16"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "AMX"),
        ({"amx_bf16": False, "avx512_bf16": True}, "AVX512-BF16"),
        ({"amx_tile": True, "avx2": True}, None),
        ({}, None),
    ],
)
def test_matrix_units_are_what_torch_says(found, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert matrix_units() == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert matrix_units() is None


class Clock:
    """Time passes while work is done, and not otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float) -> Any:
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_the_trial_takes_turns_drops_the_first_pair_and_ends_in_time():
    clock = Clock()
    assert interleaved(clock.work(1.0, 0.3, 0.1, 0.2), clock.work(9.0, 0.1), clock) == (1.0, 9.0)
    clock = Clock()
    got = interleaved(clock.work(0.4, 0.03, 0.01, 0.02), clock.work(0.3, 0.01), clock)
    assert got == pytest.approx((0.02, 0.01))
    assert clock.now == pytest.approx(0.4 + 0.3 + 0.03 + 0.01 + 5 * 0.02 + 7 * 0.01)
    clock = Clock()  # the time is up after the second pair, which counts alone
    got = interleaved(clock.work(0.7, 0.2), clock.work(0.6, 0.1), clock)
    assert got == pytest.approx((0.2, 0.1))
    clock = Clock()  # 2 s are the bound for what takes less than a fifth of a second
    interleaved(clock.work(0.2), clock.work(0.2), clock)
    assert clock.now <= 2.0


def test_the_trial_runs_the_runs_block_in_both_types(monkeypatch):
    seen: list[tuple[torch.Size, torch.dtype]] = []
    forward = Block.forward

    def watched(self, x, layout):
        y = forward(self, x, layout)
        seen.append((x.shape, self.mlp.fc1(x).dtype))
        return y

    monkeypatch.setattr(Block, "forward", watched)
    before = torch.random.get_rng_state()
    times = block_trial(architecture(tiny_config()), images=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(seconds > 0 for seconds in times)
    assert seen[:2] == [((3, 36, 32), torch.float32), ((3, 36, 32), torch.bfloat16)]
    monkeypatch.setattr(precision, "_BLOCK_FLOPS", 1.0)
    seen.clear()
    block_trial(architecture(tiny_config()), images=3)
    assert seen[0][0] == (1, 36, 32)


@pytest.mark.slow
@pytest.mark.multirank
def test_runs_on_a_cpu_in_fp32_and_bf16_and_a_resume_that_keeps_it(tmp_path: Path):
    """Here `auto` is fp32, whatever this machine has: a trial would not be a test."""
    make_images(tmp_path / "images", 12)

    def job(name: str, folder: str, enabled: Any, *more: str) -> dict[str, Any]:
        ds = {
            "train_micro_batch_size_per_gpu": 4,
            "torch_autocast": {"enabled": enabled, "dtype": "bfloat16"},
        }
        where = [f"data.path={tmp_path}/images", f"data.cache_dir={tmp_path}/cache",
                 f"run.dir={tmp_path}/{folder}"]  # fmt: skip
        return {"name": name, "overrides": [*where, "run.checkpoint_every=1", *more], "ds": ds}

    records = run_jobs(
        [
            job("off", "off", False),
            job("on", "on", True),
            job("first", "again", True, "run.stop_after=2"),
            job("rest", "again", "auto", "run.resume=true"),
        ],
        1,
        tmp_path / "jobs",
    )
    off, on = records["off"]["losses"], records["on"]["losses"]
    assert off != on
    assert on == pytest.approx(off, rel=0.03)
    assert records["first"]["losses"] + records["rest"]["losses"] == on
    for folder, name in (("off", "fp32"), ("on", "torch_autocast"), ("again", "torch_autocast")):
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        assert summary["precision"] == name
