"""`njepa plan --step` against torch's own counters, on real steps of a CPU, and against counts."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from njepa_kernels import Impl, available_impls
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.patchify.cases import _case as patchify_case
from njepa_kernels.ops.predictor_tokens.cases import _case as tokens_case
from njepa_kernels.tools import resources
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from njepa import planning as plan
from njepa.cli import main
from njepa.models.attention import SDPA
from njepa.planning import step_budget as budget
from njepa.planning.operators import KERNELS, Cost, operator_cost
from njepa.planning.step_trace import Operator, trace_step
from njepa.training.ema import low_target, make_target
from njepa.training.engine import PlainEngine
from njepa.training.module import TrainModule
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, training_step
from tests.support.tiny import N_CONTEXT, N_TARGETS, make_batch, tiny_config

SHAPE, BATCH = plan.Shape(N_CONTEXT, N_TARGETS), 4
RATES = Rates(lr=1e-4, weight_decay=0.04, momentum=0.996)


@cache
def traced(method: str, low: bool, checkpoint: bool = False, fused: bool = False) -> list[Operator]:
    """With attention as two products, which is what the CPU runs beside it."""
    config = tiny_config(method, model={"checkpoint_blocks": checkpoint, "fused_block": fused})
    with sdpa_kernel(SDPBackend.MATH):
        return trace_step(config, SHAPE, BATCH, low, SDPA)


def prepared(method: str, low: bool, impl: Impl = "reference") -> Any:
    """A real step, to be called; its moments are there already."""
    config = tiny_config(method, impl={"default": impl})
    module = TrainModule(config)
    engine = PlainEngine(module, config.optim, torch.device("cpu"), low=low)
    target = make_target(module.jepa.encoder)
    state = TrainState(engine, target, impl=impl, low=low_target(target) if low else None)

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            training_step(state, [make_batch(config)], RATES)

    step()
    return step


@pytest.mark.parametrize("method", ["ijepa", "njepa", "ncjepa"])
def test_flops_are_those_of_torchs_counter(method: str) -> None:
    step = prepared(method, low=False)
    with FlopCounterMode(display=False) as counter:
        step()
    assert sum(o.cost.flops for o in traced(method, False)) == counter.get_total_flops()


#: Operators that the fused ops' references do not contain.
SEEN = ("addmm", "mm", "bmm", "native_layer_norm", "native_layer_norm_backward", "gelu",
        "gelu_backward")  # fmt: skip


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_operators_and_their_sizes_are_those_of_torchs_profiler(low: bool) -> None:
    step = prepared("ijepa", low)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step()
    real: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for event in found.events():
        name = event.name.removeprefix("aten::")
        shapes = [s for s in event.input_shapes if s and all(isinstance(n, int) for n in s)]
        of_the_loss = name == "native_layer_norm" and len(shapes) == 1  # the reference's own
        if name in SEEN and not of_the_loss:
            real[name, tuple(torch.Size(s).numel() for s in shapes)] += 1
    ours = Counter(
        (name, o.inputs) for o in traced("ijepa", low)
        if (name := o.name.removeprefix("aten.")) in SEEN
    )  # fmt: skip
    assert real == ours
    assert real.total() > 100


class _Written(TorchDispatchMode):
    """Bytes of new memory by operator, from the storages of real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        known = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
        name = str(func._overloadpacket)
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes[name] += tensor.untyped_storage().nbytes()
        return out


@pytest.mark.skipif(
    available_impls()["jepa_loss"]["native"] != "yes", reason="references move more"
)
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_written_bytes_are_the_memory_of_a_real_step(low: bool) -> None:
    step = prepared("ijepa", low, "native")
    with _Written() as real:
        step()
    ours: Counter[str] = Counter()
    for o in traced("ijepa", low):
        ours[o.name] += o.cost.written
    for name in (*SEEN, "_to_copy", "stack", "embedding", "sum"):
        assert ours[f"aten.{name}"] == real.bytes[f"aten.{name}"], name
        assert ours[f"aten.{name}"] > 0 or name == "stack", name


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_bytes_that_a_block_under_autocast_moves_for_a_token_and_channel(fused: bool) -> None:
    """By hand: of a norm 8, its cast 6, qkv 8, attention 8, proj 4, addition 10; norm 8, cast 6,
    fc1 10, GELU 16, fc2 10, addition 10. 64 of these 104 are not of products or attention. The
    weights of the target encoder are in bf16 already. Fused are addition, norm and cast, 12, twice.
    """
    config = tiny_config("ijepa", model={"fused_block": fused})
    shallow, deep = (
        trace_step(
            config.model_copy(update={"model": config.model.model_copy(update={"depth": depth})}),
            SHAPE, BATCH, low=True,
        )
        for depth in (1, 2)
    )  # fmt: skip
    d, tokens = 32, BATCH * 36
    weights = 12 * d * d
    biases = 5 * d if fused else 9 * d  # the GELU adds that of fc1, in fp32

    def bytes_of(operators: list[Operator], parts: tuple[str, ...]) -> int:
        return sum(
            o.cost.read + o.cost.written for o in operators
            if o.phase == "target encoder" and budget.part_of(o) in parts
        )  # fmt: skip

    products = ("qkv", "attention", "attention proj", "MLP fc1", "MLP fc2")
    rest = ("norm", "casts", "residual", "GELU")
    statistics = tokens * (2 * 2 * 4) + 2 * 2 * d * 4  # of both norms, and their weights
    statistics += 4 * 4 * d if fused else 0
    beside_attention = tokens * 2 * 4 + 24  # log-sum-exp of two heads, state of its dropout
    for parts, each, beside in (
        (products, 40, 2 * (weights + biases) + beside_attention),
        (rest, 40 if fused else 64, statistics),
    ):
        block = bytes_of(deep, parts) - bytes_of(shallow, parts)
        assert block == each * tokens * d + beside, parts


def test_what_must_be_moved_is_less_and_fused_ops_move_what_they_must() -> None:
    operators = traced("ncjepa", True)
    for o in operators:
        assert 0 <= budget.must_move(o, True) <= o.cost.read + o.cost.written, o
    loss = next(o for o in operators if o.name == "njepa.jepa_loss")
    assert budget.must_move(loss, True) == loss.cost.read + loss.cost.written
    phases = {o.phase for o in (*operators, *traced("njepa", False))}
    assert phases == set(budget.PHASES)


def test_the_budget_follows_the_code() -> None:
    """Checkpointing computes the blocks again, but for what nothing in their backward needs."""
    plain, again = (sum(o.cost.flops for o in traced("ijepa", True, c)) for c in (False, True))
    recomputed = plan.recomputed_flops(tiny_config("ijepa"), SHAPE, BATCH)
    assert 0.6 * recomputed < again - plain <= recomputed


def test_fused_blocks_move_less_and_must_move_the_same() -> None:
    plain, fused = (traced("njepa", True, fused=f) for f in (False, True))

    def flops(operators: list[Operator], key: Callable[[Operator], str]) -> dict[str, float]:
        sums = budget.sums(operators, key, budget.Rates(1.0, 1.0), True)
        return {name: one.flops for name, one in sums.items() if one.flops}

    for key in (budget.phase_of, budget.part_of, lambda o: o.module):
        assert flops(fused, key) == flops(plain, key)
    phases = {o.phase for o in plain if o.backward and o.cost.flops}
    assert phases == {"context encoder", "predictor", "noise predictor"}
    must = [sum(budget.must_move(o, True) for o in operators) for operators in (plain, fused)]
    moved = [sum(o.cost.read + o.cost.written for o in operators) for operators in (plain, fused)]
    assert must[1] == pytest.approx(must[0], rel=0.01)
    assert must[1] < moved[1] < moved[0]


def cost(function: Any, *args: Any) -> Cost:
    out = function(*args)
    return operator_cost(function, args, {}, out)


def test_rules_by_hand() -> None:
    aten, x = torch.ops.aten, torch.zeros(6, 4)
    assert cost(aten.view.default, x, [24]) == Cost(0, 0, 0, 0)
    assert cost(aten.t.default, x) == Cost(0, 0, 0, 0)
    assert cost(aten.add.Tensor, x, x) == Cost(192, 96, 0, 1)
    assert cost(aten.add.Tensor, x, torch.zeros(1, 4).expand(6, 4)) == Cost(112, 96, 0, 1)
    assert cost(aten.add_.Tensor, x, x) == Cost(192, 96, 0, 1)
    assert cost(aten.copy_.default, x, torch.zeros(6, 4, dtype=torch.bfloat16)).read == 48
    assert cost(aten.zero_.default, x) == Cost(0, 96, 0, 1)
    assert cost(aten.embedding.default, x, torch.zeros(2, dtype=torch.int64)) == Cost(48, 32, 0, 1)
    assert cost(aten.mm.default, x, x.t()) == Cost(192, 144, 2 * 6 * 6 * 4, 1)
    assert cost(aten.empty_like.default, x) == Cost(0, 0, 0, 0)


def test_a_norms_backward_reads_its_inputs_twice_where_its_weight_learns() -> None:
    x, gradient, statistics = torch.ones(6, 4), torch.ones(6, 4), torch.ones(6, 1)
    backward = torch.ops.aten.native_layer_norm_backward.default
    given = (gradient, x, [4], statistics, statistics, torch.ones(4), torch.ones(4))
    once = 2 * 96 + 2 * 24 + 2 * 16
    assert cost(backward, *given, [True, False, False]) == Cost(once, 96, 0, 1)
    assert cost(backward, *given, [True, True, True]) == Cost(once + 2 * 96, 96 + 32, 0, 2)


def test_fused_ops_move_the_bytes_of_their_cases() -> None:
    def moved(phase: str, *names: str) -> int:
        return sum(
            o.cost.read + o.cost.written for o in traced("ijepa", False)
            if o.phase == phase and o.name.removeprefix("njepa.") in names
        )  # fmt: skip

    tokens = "predictor_tokens", "predictor_tokens_backward"
    params = plan.network(tiny_config("ijepa")).encoder_parameters
    fp32 = torch.float32
    for got, formula in (
        (moved("target encoder", "patchify"), patchify_case("", 4, (6, 6), 8).bytes(fp32, "fwd")),
        (moved("context encoder", "patchify"),
         patchify_case("", 4, (6, 6), 8, N_CONTEXT).bytes(fp32, "fwd")),
        (moved("loss", "jepa_loss", "jepa_loss_backward"),
         loss_case("", 4, 4, N_TARGETS, 36, 32).bytes(fp32, "fwdbwd")),
        (moved("predictor", *tokens),
         tokens_case("", 4, 4, N_CONTEXT, N_TARGETS, 36, 24, noise=None).bytes(fp32, "fwdbwd")),
        (moved("EMA", "ema_update_"), 12 * params),
    ):  # fmt: skip
        assert got == pytest.approx(formula, rel=0.07)  # the positions' table has no gradient here


def test_one_pass_of_adamw_and_the_average_reads_the_weights_once() -> None:
    fused = tiny_config("ijepa", optim={"fused_update": True})
    apart, one = (
        [o for o in trace_step(config, SHAPE, BATCH, True, SDPA) if o.phase in ("optimizer", "EMA")]
        for config in (tiny_config("ijepa"), fused)
    )
    follows = plan.network(fused).target_parameters - 36 * 32  # but for the positions
    saved = sum(o.cost.read + o.cost.written for o in apart if budget.part_of(o) != "other")
    saved -= sum(o.cost.read + o.cost.written for o in one if budget.part_of(o) != "other")
    assert saved == pytest.approx(4 * follows, rel=0.01)
    assert {o.phase for o in one} == {"optimizer"}
    must = [sum(budget.must_move(o, True) for o in found) for found in (apart, one)]
    assert must[0] == pytest.approx(must[1], rel=0.01)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_fused_ops_launch_what_is_counted() -> None:
    for op, size, backward in (
        ("jepa_loss", "vitl16-224-b8", "bwd"), ("vicreg", "m4-n128-d384", "bwd"),
        ("predictor_tokens", "vits16-224-b8", "fwd"),
    ):  # fmt: skip
        (case,) = [case for case in resources.cases(op, size) if case.size == size]
        found = {x.kernel.__name__ for x in resources.launches(case, torch.bfloat16, 90)}
        mine = {name for name in found if name.startswith(f"_{op}") and backward not in name}
        assert len(mine) == KERNELS[op if backward == "bwd" else f"{op}_backward"], mine


def test_a_kernel_takes_the_longer_of_its_times() -> None:
    product = Operator("aten.mm", "loss", False, "", Cost(30, 10, 100, 1), (10, 5), (5,))
    copy = Operator("aten.add", "loss", False, "", Cost(30, 10, 0, 1), (10,), (5,))

    def seconds(flops: float, bandwidth: float, *operators: Operator) -> tuple[float, float]:
        rates = budget.Rates(flops, bandwidth)
        (one,) = budget.sums(operators, lambda _: "all", rates, True).values()
        return one.seconds, one.ideal

    assert seconds(10.0, 1e9, product) == (10.0, 10.0)
    assert seconds(1e9, 4.0, product) == (10.0, 10.0)
    assert seconds(1e9, 4.0, copy) == (10.0, 0.0)
    assert seconds(10.0, 4.0, product, copy)[0] == 20.0


TINY_PLAN = [
    "plan", "--step", "--recipe", "shapes-tiny", "--micro", "2", "--gpu", "h100",
    "model.depth=1", "model.predictor.depth=1",
]  # fmt: skip


def test_the_table_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    assert main([*TINY_PLAN, "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Predicted, not measured" in text
    assert len(text.splitlines()) < 50
    assert max(map(len, text.splitlines())) <= 110
    content = json.loads(path.read_text())
    for name, total in content["step"].items():
        assert sum(row[name] for row in content["rows"]) == pytest.approx(total), name
    assert content["step"]["moved"] > content["step"]["must"] > 0
    step = next(line for line in text.splitlines() if line.startswith("step ")).split()
    assert step[1] == str(content["step"]["launches"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([*TINY_PLAN, "--json", "nowhere/step.json"], "cannot be written in nowhere"),
        ([*TINY_PLAN, "--micro", "0"], "--micro must be at least"),
        ([*TINY_PLAN, "--micro", "1", "method=cjepa"], "--micro must be at least 2, got 1"),
        ([*TINY_PLAN, "mask.ragged=true"], "mask.ragged=true is not covered"),
        (["plan", "--micro", "4"], "--micro belongs to --step"),
        (["plan", "--json", "x"], "--json belongs to --step"),
    ],
)
def test_bad_input_is_one_line(given: list[str], message: str, capsys: Any) -> None:
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_pure_bf16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ds = {"train_batch_size": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    assert main([*TINY_PLAN, "--ds_config", str(tmp_path / "ds.json")]) == 2
    assert "plan with torch_autocast" in capsys.readouterr().err
