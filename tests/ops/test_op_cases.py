"""What every op must satisfy, over the list of cases: nothing here knows a single op."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from njepa_kernels import available_impls
from njepa_kernels._runtime.dispatch import IMPLEMENTATIONS, choose
from njepa_kernels.testing import (
    OpCase,
    all_cases,
    assert_case_within_baseline,
    cast_inputs,
    copy_inputs,
    evaluate,
)

CPU = torch.device("cpu")
CASES = all_cases(small=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = range(4)

NOT_EMPTY = [case for case in CASES if not case.size.startswith(("b0", "none"))]


def _runs(op: str, impl: str) -> bool:
    try:
        return choose(op, impl, CPU) == impl
    except RuntimeError:
        return False


#: Every case with every implementation that runs on this machine's CPU.
PAIRS = [(case, impl) for case in CASES for impl in IMPLEMENTATIONS if _runs(case.op, impl)]

each_pair = pytest.mark.parametrize(
    ("case", "impl"), PAIRS, ids=[f"{case.name}-{impl}" for case, impl in PAIRS]
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def _tensors(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in inputs.items():
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, torch.Tensor):
                found[f"{name} {i}"] = item
    return found


def _strided(value: Any) -> Any:
    """The same values, every second element of a larger buffer whose gaps are poisoned."""
    if isinstance(value, list):
        return [_strided(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    poison = float("nan") if value.is_floating_point() else torch.iinfo(value.dtype).max
    wide = torch.full((*value.shape, 2), poison, dtype=value.dtype)
    wide[..., 1] = value
    return wide[..., 1]


def test_every_op_has_cases_with_and_without_samples() -> None:
    for op in available_impls():
        sizes = [case for case in CASES if case.op == op]
        assert len(sizes) >= 3
        assert any(not case.small for case in all_cases(op)), f"{op} has no benchmark size"
    assert len({case.name for case in all_cases()}) == len(all_cases())


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """torch.empty gives nan: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned")
@each_dtype
@each_pair
def test_values_and_gradients_are_within_the_baseline(
    case: OpCase, impl: str, dtype: torch.dtype
) -> None:
    function = partial(case.function, impl=impl)
    assert_case_within_baseline(case, function, CPU, dtype, SEEDS, impl)


@each_case
def test_fp64_stays_fp64(case: OpCase) -> None:
    inputs = cast_inputs(case.make_inputs(CPU, torch.float32, 0), torch.float64)
    values = evaluate(case, case.reference, inputs)
    for name, value in values.items():
        assert value.dtype == torch.float64, name


@pytest.mark.parametrize(
    "case",
    [case for case in NOT_EMPTY if case.differentiable and case.is_derivative],
    ids=lambda case: case.name,
)
def test_gradcheck(case: OpCase) -> None:
    inputs = cast_inputs(case.make_inputs(CPU, torch.float32, 1), torch.float64)
    names = [name for name in case.differentiable if inputs[name] is not None]

    def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = case.function(**(inputs | dict(zip(names, leaves, strict=True))))
        outputs = case.outputs(result, inputs).values()
        return tuple(out for out in outputs if out.requires_grad)

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@each_pair
def test_non_contiguous_inputs(case: OpCase, impl: str) -> None:
    inputs = case.make_inputs(CPU, torch.float32, 2)
    strided = {name: _strided(value) for name, value in inputs.items()}
    assert all(t.numel() < 2 or not t.is_contiguous() for t in _tensors(strided).values())

    def run(given: dict[str, Any]) -> dict[str, torch.Tensor]:
        for name in case.differentiable:
            if given[name] is not None:
                given[name] = given[name].detach().requires_grad_()
        outputs = case.outputs(case.function(**given, impl=impl), given)
        roots = [out.sum() for out in outputs.values() if out.requires_grad]
        if roots:
            torch.autograd.backward(roots)
        grads = {n: given[n].grad for n in case.differentiable if given[n] is not None}
        return outputs | {f"d {name}": grad for name, grad in grads.items()}

    plain = run(copy_inputs(inputs))
    for name, value in run(strided).items():
        torch.testing.assert_close(value, plain[name], equal_nan=True, msg=f"{case.name} {name}")


@each_pair
def test_two_runs_give_the_same_bits(case: OpCase, impl: str) -> None:
    inputs = case.make_inputs(CPU, torch.bfloat16, 3)
    first, second = (evaluate(case, partial(case.function, impl=impl), inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(7.0), second[name].nan_to_num(7.0)), name


@each_pair
def test_inputs_that_are_not_outputs_are_left_alone(case: OpCase, impl: str) -> None:
    inputs = case.make_inputs(CPU, torch.float32, 4)
    before = _tensors(copy_inputs(inputs))
    written = {id(t) for t in case.outputs(case.function(**inputs, impl=impl), inputs).values()}
    for name, value in _tensors(inputs).items():
        if id(value) not in written:
            assert torch.equal(value, before[name]), name


OPS_AND_IMPLS = sorted({(case.op, impl) for case, impl in PAIRS})


@pytest.mark.parametrize(("op", "impl"), OPS_AND_IMPLS, ids=map("-".join, OPS_AND_IMPLS))
def test_compiles_as_one_graph(op: str, impl: str) -> None:
    torch.compiler.reset()
    for case in [case for case in CASES if case.op == op][:2]:
        function = partial(case.function, impl=impl)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        inputs = case.make_inputs(CPU, torch.float32, 5)
        expected = evaluate(case, function, inputs)
        for name, value in evaluate(case, compiled, inputs).items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("case", NOT_EMPTY, ids=lambda case: case.name)
def test_costs_are_positive_and_grow_with_the_backward(case: OpCase) -> None:
    assert 0 < case.bytes(torch.bfloat16, "fwd") <= case.bytes(torch.float32, "fwd")
    if case.differentiable:
        assert case.bytes(torch.float32, "fwd") < case.bytes(torch.float32, "fwdbwd")
    assert 0 <= case.flops("fwd") <= case.flops("fwdbwd")
