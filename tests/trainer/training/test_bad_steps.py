"""A step whose loss or gradient is not finite changes nothing on any rank; training continues."""

from __future__ import annotations

import json
import math

import pytest
import torch

from njepa.training.ema import make_target
from njepa.training.engine import PlainEngine
from njepa.training.health import BadSteps, StepNote, gate
from njepa.training.module import TrainModule
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, training_step
from tests.support.broken_steps import KINDS, NAN, digest
from tests.support.jobs import make_images, run_jobs
from tests.support.tiny import make_batch, tiny_config

CPU = torch.device("cpu")
RATES = Rates(lr=1e-2, weight_decay=0.1, momentum=0.9)


class Breakable(PlainEngine):
    """The plain engine, whose next loss can be broken."""

    kind: str | None = None

    def forward(self, batch, h):
        loss, metrics = super().forward(batch, h)
        return (KINDS[self.kind](loss) if self.kind else loss), metrics


def build(low: bool = False, accumulation: int = 1) -> TrainState:
    config = tiny_config("ncjepa")
    module = TrainModule(config)
    target = make_target(module.jepa.encoder)
    engine = Breakable(module, config.optim, CPU, low=low, accumulation=accumulation)
    return TrainState(engine, target)


def kept(state: TrainState) -> str:
    engine = state.engine
    moments = [x for s in engine.optimizer.state.values() for x in s.values()]
    return digest(
        [
            *engine.module.parameters(),
            *engine.module.buffers(),
            *moments,
            *state.target.parameters(),
        ]
    )


def step(state: TrainState, number: int, kind: str | None = None, accumulation: int = 1):
    batches = []
    for micro in range(accumulation):
        batches.append(make_batch(tiny_config("ncjepa"), step=accumulation * number + micro))

    def feed():
        for micro, batch in enumerate(batches):
            state.engine.kind = kind if micro == 0 else None
            yield batch

    return training_step(state, feed(), RATES)


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_step_changes_nothing(kind: str, low: bool):
    state = build(low)
    for number in range(2):
        before = kept(state)
        assert not step(state, number).update.bad
        assert kept(state) != before
    before = kept(state)
    update = step(state, 2, kind).update
    assert update.bad
    assert not update.norm.isfinite()
    assert kept(state) == before


def test_training_goes_on_as_if_the_bad_step_had_not_been():
    """Not even its count in Adam's bias correction."""
    broken, whole = build(), build()
    for state in (broken, whole):
        step(state, 0)
    step(broken, 1, "loss")
    for state in (broken, whole):
        step(state, 2)
    assert kept(broken) == kept(whole)


def test_one_bad_micro_batch_spoils_the_step():
    state = build(accumulation=2)
    step(state, 0, accumulation=2)
    before = kept(state)
    assert step(state, 1, "gradient", accumulation=2).update.bad
    assert kept(state) == before
    assert not step(state, 2, accumulation=2).update.bad


def test_a_bad_first_step_leaves_no_moments_behind():
    broken, fresh = build(), build()
    assert step(broken, 0, "loss").update.bad
    for state in (broken, fresh):
        step(state, 1)
    assert kept(broken) == kept(fresh)


def test_the_gate_keeps_the_bits_of_a_good_gradient():
    for value, expected in ((1.7, 0.3), (math.inf, NAN), (NAN, NAN)):
        x = torch.tensor(0.1, requires_grad=True)
        gate(0.3 * x + value).backward()
        torch.testing.assert_close(x.grad, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_counts_since_the_last_reading_and_in_a_row():
    bad, step = BadSteps(), 0

    def read(*verdicts: bool):
        nonlocal step
        for verdict in verdicts:
            bad.add(StepNote(step, torch.tensor(verdict), [], None))
            step += 1
        notes, longest, began = bad.read()
        return [note.step for note in notes], longest, began

    assert read(False, True, True, False, True) == ([1, 2, 4], 2, 1)
    assert read(True, False) == ([5], 2, 4)  # the row continues
    assert read(False, True, True) == ([8, 9], 2, 8)
    assert read(True, True, False) == ([10, 11], 4, 8)
    assert read(False) == ([], 0, 13)


#: Of the runs on two ranks: their length, and the step that is broken on one of them.
STEPS, BROKEN = 4, 2
#: kind, ZeRO stage, more of the DeepSpeed file.
CASES = {
    "zero0-loss": ("loss", 0, {}),
    "zero0-gradient": ("gradient", 0, {"gradient_clipping": 1.0}),
    "zero0-infinite": ("infinite", 0, {"torch_autocast": {"enabled": True}}),
    "zero1-accumulated": ("gradient", 1, {"gradient_accumulation_steps": 2}),
    "zero1-bf16": ("infinite", 1, {"bf16": {"enabled": True}}),
    "zero2-loss": ("loss", 2, {"gradient_clipping": 1.0}),
    "zero3-infinite": ("infinite", 3, {}),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad-steps")
    make_images(root / "images", 40)

    def job(name, kind, stage, ds, first, count, overrides=()):
        accumulation = ds.get("gradient_accumulation_steps", 1)
        micro_steps = [accumulation * (first + i) for i in range(count)]
        return {
            "name": name,
            "broken": {"kind": kind, "rank": 1, "micro_steps": micro_steps},
            "overrides": [
                f"data.path={root}/images", f"data.cache_dir={root}/cache",
                f"run.dir={root}/runs/{name}", "method=ncjepa", f"run.max_steps={STEPS}",
                *overrides,
            ],
            "ds": {
                "train_micro_batch_size_per_gpu": 4,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                **ds,
            },
        }  # fmt: skip

    jobs = [job(name, *case, first=BROKEN, count=1) for name, case in CASES.items()]
    ending = ["run.max_bad_steps=2", "run.checkpoint_every=1", "eval.report=true"]
    jobs.insert(0, job("ending", "loss", 0, {}, first=1, count=9, overrides=ending))
    return root / "runs", run_jobs(jobs, 2, root / "jobs")


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_a_bad_step_of_one_rank_changes_nothing_on_any(ran, name: str):
    runs, records = ran
    record = records[name]
    assert record["step"] == STEPS
    assert record["bad"] == [[number == BROKEN] * 2 for number in range(STEPS)]
    for number in range(1, STEPS):
        same = [a == b for a, b in zip(*record["kept"][number - 1 : number + 1], strict=True)]
        assert same == [number == BROKEN] * 2, number
    lines = [json.loads(x) for x in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("bad_steps") for line in lines] == [None, None, 1, None]
    assert ["loss" in line for line in lines] == [True, True, False, True]
    assert ["grad_norm" in line for line in lines] == [True, True, False, True]
    numbers = [value for line in lines for value in line.values()]
    assert all(math.isfinite(value) for value in numbers)


@pytest.mark.slow
@pytest.mark.multirank
def test_too_many_in_a_row_end_the_run_with_good_weights(ran):
    runs, records = ran
    record = records["ending"]
    assert record["step"] == 3  # the first step is good, two are bad
    assert "not finite in 2 steps in a row up to step 3 (run.max_bad_steps=2)" in record["error"]
    assert all(torch.isfinite(x).all() for x in record["target"].values())
    assert "Not finite" in (runs / "ending" / "report.html").read_text()
