"""The published step of the benchmark: the same loss, gradients and updates as ours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench import our_step, step_race
from bench.our_step import OurStep
from bench.published.masks import PublishedCollator
from bench.published.step import PublishedStep
from bench.step_race import PhaseClock, Race, Runner, check_memory, shape_of
from bench.step_sizes import (
    STATIC,
    VARIANTS,
    Case,
    Variant,
    needed_bytes,
    parse_case,
    published_size,
    step_config,
    usual_variants,
)
from njepa.data.batch import Batch, Masks
from njepa.training.module import TrainModule

CPU = torch.device("cpu")
TINY = Case(
    "tiny",
    (
        "data.image_size=48", "model.patch_size=8", "model.width=32", "model.depth=2",
        "model.heads=2", "model.predictor={depth: 2, width: 24, heads: 2}", "mask.min_keep=2",
        "model.init=xavier", "impl.default=reference",
    ),
    4,
)  # fmt: skip


def make_batch(step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    order = torch.rand(4, 5, 36, generator=generator).argsort(-1)
    images = torch.randint(0, 256, (4, 48, 48, 3), generator=generator, dtype=torch.uint8)
    targets = order[:, 1:, :6].sort(-1).values
    masks = Masks(order[:, 0, :11].sort(-1).values, targets)
    return Batch(images, masks, None, torch.arange(4), step)


def make_steps() -> tuple[PublishedStep, OurStep]:
    config = step_config(TINY)
    weights = {k: v.clone() for k, v in TrainModule(config).jepa.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for name, value in weights.items():
        if "pos_embed" not in name and value.dim() == 1:  # biases of zero would hide their order
            value += 0.1 * torch.randn(value.shape, generator=generator)
    published = PublishedStep(published_size(config), weights, CPU, low=False, compiled=False)
    ours = OurStep(config, weights, CPU, low=False)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():  # a target that differs from the context encoder
        for (name, q), k in zip(
            published.target.named_parameters(), ours.target.parameters(), strict=True
        ):
            if name != "pos_embed":
                q += 0.05 * torch.randn(q.shape, generator=noise)
                k.copy_(q)
    return published, ours


def published(batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The batch as the published loader gives it: ToTensor, Normalize, lists of masks."""
    data = step_config(TINY).data
    mean, std = (torch.tensor(x)[:, None, None] for x in (data.mean, data.std))
    images = (batch.images.permute(0, 3, 1, 2) / 255 - mean) / std
    return images, [batch.masks.context_idx], list(batch.masks.target_idx.unbind(1))


def test_loss_and_gradients():
    theirs, ours = make_steps()
    batch = make_batch()
    expected = theirs.loss(*published(batch))
    expected.backward()
    with torch.no_grad():
        h = ours.target(batch.images)
    loss, _ = ours.module(batch, h)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    jepa = ours.module.jepa
    for mine, other in ((jepa.encoder, theirs.encoder), (jepa.predictor, theirs.predictor)):
        found = dict(mine.named_parameters())
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                error = (found[name].grad - parameter.grad).norm()
                # The keys' bias has no gradient but rounding: measured against the whole bias.
                assert error <= 2e-6 * parameter.grad.norm(), name
            else:
                assert found[name].grad is None


def test_steps_stay_together():
    """Optimizer groups, EMA and the zeroing of gradients included."""
    theirs, ours = make_steps()
    losses, before = [], [p.clone() for p in ours.target.parameters()]
    for number in range(4):
        batch = make_batch(number)
        expected = theirs(*published(batch))
        losses.append(ours(batch).item())
        assert losses[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert len(set(losses)) == 4
    pairs = zip(theirs.target.named_parameters(), ours.target.parameters(), before, strict=True)
    for (name, expected), got, old in pairs:
        moved, wanted = got - old, expected - old
        if name == "pos_embed":  # equal on both sides; the published average still rounds
            assert moved.abs().max() == 0
            continue
        if name.endswith("qkv.bias"):
            # The keys' gradient is pure rounding, which Adam turns into full steps.
            moved, wanted = (torch.cat((x.chunk(3)[0], x.chunk(3)[2])) for x in (moved, wanted))
        assert (moved - wanted).norm() <= 0.03 * wanted.norm(), name
        assert wanted.norm() > 0, name


@pytest.mark.parametrize(
    ("step", "context", "targets"),
    [
        (0, ((5, 59), 22158), ((5, 36), [16650, 16830, 14814, 16110])),
        (1, ((5, 67), 23365), ((5, 35), [13335, 16625, 14035, 18095])),
        (2, ((5, 76), 31879), ((5, 35), [12775, 16100, 16345, 15435])),
    ],
)
def test_the_collator_draws_as_a_second_implementation_did(
    step: int, context: tuple[Any, int], targets: tuple[Any, list[int]]
):
    """Shapes and sums of what another per-image sampler drew from the same generators."""
    collator = PublishedCollator((14, 14))
    collator.step = step - 1
    torch.manual_seed(step)
    (kept,), blocks = collator(5)
    assert (kept.shape, int(kept.sum())) == context
    assert ({tuple(b.shape) for b in blocks}, [int(b.sum()) for b in blocks]) == (
        {targets[0]}, targets[1]
    )  # fmt: skip


class Recorder(PhaseClock):
    """Notes the phases in the order in which they begin, and refuses one inside another."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.entered: list[str] = []
        self.inside = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        assert not self.inside, name
        self.entered.append(name)
        self.inside = True
        with super().__call__(name):
            yield
        self.inside = False


def test_phases_cover_the_step():
    """Every phase of both steps is entered once, in order, and none inside another."""
    batch = make_batch()
    for step in make_steps():
        clock = Recorder(CPU)
        if isinstance(step, OurStep):
            step(batch, clock)
        else:
            step(*published(batch), clock)
        assert clock.entered == [
            "target", "context", "predictor", "loss", "backward", "optimizer", "EMA"
        ]  # fmt: skip
        assert all(clock.seconds[name] > 0 for name in clock.entered)
        if isinstance(step, OurStep):
            assert not any(m._forward_hooks for m in step.module.modules())


def test_race_of_a_small_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.step_race.parse_case", lambda name: TINY._replace(batch=3))
    race = Race("tiny-b3", CPU, rounds=2, warmup=1, phase_steps=1, only=["eager", "auto"])
    rows = {name: race.row(name) for name in ("eager", "auto")}
    for row in rows.values():
        assert row["size"] == "tiny-b3"
        assert row["rounds"] == 2
        assert row["flops"] == rows["eager"]["flops"] > 0
        assert row["compilations"] == 0
        assert (row["clock"], row["masks"]) == ("wall, 1 steps", "drawn")
        assert set(row["phases"]) == {"data", "target", "context", "predictor", "loss",
                                      "backward", "optimizer", "EMA"}  # fmt: skip
    ours, theirs = (race.runners[name].seconds for name in ("auto", "eager"))
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    assert rows["auto"]["faster_than_eager"] == pytest.approx(sum(ratios) / 2)
    assert rows["eager"]["faster_than_eager"] == 1.0
    assert rows["auto"]["attention"].startswith("sdpa (dense masks")  # as the trainer says it
    assert "attention" not in rows["eager"]


def test_a_wrong_variant_gets_no_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.step_race.parse_case", lambda name: TINY)
    right = PublishedStep.loss
    monkeypatch.setattr(PublishedStep, "loss", lambda *args: 1.01 * right(*args))
    with pytest.raises(AssertionError, match="eager"):
        Race("tiny-b4", CPU, rounds=1, warmup=0, phase_steps=1, only=["eager", "auto"])


def test_a_race_in_two_types(monkeypatch: pytest.MonkeyPatch):
    """fp32 and bf16 beside each other on a CPU; each is checked against its own."""
    monkeypatch.setattr("bench.step_race.parse_case", lambda name: TINY._replace(batch=3))
    names = ["eager", "auto", "eager-bf16", "auto-bf16", "fused-bf16"]
    race = Race("tiny-b3", CPU, rounds=1, warmup=1, phase_steps=1, only=names)
    rows = {name: race.row(name) for name in names}
    assert [rows[name]["dtype"] for name in names] == ["fp32"] * 2 + ["bf16 autocast"] * 3
    seconds = {name: race.runners[name].seconds[0] for name in names}
    for other in ("eager", "eager-bf16"):
        found = rows["auto-bf16"][f"faster_than_{other}"]
        assert found == pytest.approx(seconds[other] / seconds["auto-bf16"])
    low = race.runners["auto-bf16"]._ours
    assert low is not None
    assert low.state.low is not None  # the trainer's bf16 target, too

    right = PublishedStep.loss
    monkeypatch.setattr(
        PublishedStep, "loss", lambda self, *rest: (1.05 if self.low else 1) * right(self, *rest)
    )
    with pytest.raises(AssertionError, match="eager-bf16"):
        Race("tiny-b3", CPU, rounds=1, warmup=0, phase_steps=1, only=names)


def test_what_a_machine_races():
    assert "auto-bf16" in usual_variants("cpu", bf16_units=True)
    assert not any("bf16" in name for name in usual_variants("cpu", bf16_units=False))
    on_gpu = usual_variants("cuda", bf16_units=False)
    assert "blocks" in on_gpu
    assert not any("bf16" in name for name in on_gpu)


def test_names_of_sizes():
    case = parse_case("vitl16-224-b128")
    config = step_config(case)
    assert (config.model.encoder, config.model.predictor.depth, case.batch) == (
        "vit_large",
        12,
        128,
    )
    assert math.prod(config.grid) == 196
    assert parse_case("vith14-224-bmax").batch is None
    with pytest.raises(ValueError, match="vits16-224-b8 or vitl16-224-bmax, got 'vitx16'"):
        parse_case("vitx16")


def test_every_shape_is_met_before_it_is_timed(monkeypatch: pytest.MonkeyPatch):
    """By every variant, and with static masks for all as soon as one variant has them."""
    monkeypatch.setattr("bench.step_race.parse_case", lambda name: TINY._replace(batch=3))
    monkeypatch.setitem(VARIANTS, "static", Variant((STATIC,), compiled=False))
    met: set[tuple[str, tuple[int, int]]] = set()
    timed: list[tuple[str, tuple[int, int]]] = []
    right, clocked = Runner.step, Runner.timed

    def step(self: Runner, inputs: step_race.Inputs, *rest: object) -> torch.Tensor:
        met.add((self.name, shape_of(inputs)))
        return right(self, inputs, *rest)

    def on_the_clock(self: Runner, inputs: step_race.Inputs) -> None:
        key = self.name, shape_of(inputs)
        assert key in met, f"{key} was never run before"
        timed.append(key)
        clocked(self, inputs)

    monkeypatch.setattr(Runner, "step", step)
    monkeypatch.setattr(Runner, "timed", on_the_clock)
    for names, rounds, most in ((["eager", "auto"], 8, 8), (["eager", "static"], 12, 2)):
        monkeypatch.setattr(step_race, "SHAPES", most)
        met.clear()
        timed.clear()
        race = Race("tiny-b3", CPU, rounds=rounds, warmup=1, phase_steps=1, only=names)
        assert len(timed) == 2 * rounds
        assert 1 < len({shape for _, shape in timed}) <= most
        assert race.static == ("static" in names)


def test_ours_computes_attention_as_the_trainer_chooses(monkeypatch: pytest.MonkeyPatch):
    chosen = our_step.choose_attention(
        step_config(TINY).model, step_config(TINY).mask, {12, 16}, CPU, torch.float32
    )
    asked = []

    def choose(*args: object) -> object:
        asked.append(args[2:])
        return chosen

    monkeypatch.setattr(our_step, "choose_attention", choose)
    _, ours = make_steps()
    assert asked == [({12, 16}, CPU, torch.float32)]
    for part in (ours.module.jepa.encoder, ours.module.jepa.predictor, ours.target):
        assert part.attention == chosen


def test_a_race_that_does_not_fit_is_refused():
    """H/14 with 128 images on 80 GB: one at a time, and no two of the published step and ours."""
    free, case = 78.0 * 2**30, parse_case("vith14-224-b128")
    check_memory(case, ["auto"], True, free)
    with pytest.raises(ValueError, match=r"eager, auto at vith14-224-b128 need 8\d GiB together"):
        check_memory(case, ["eager", "auto"], True, free)
    one, two = (needed_bytes(case, names, True) for names in (["auto"], ["auto", "reference"]))
    states = 4 * 3 * 6.5e8  # weights, AdamW's two moments
    assert 1.0 < (two - one) / states < 1.5  # and the target encoder
