"""The ops as PyTorch sees them: schema, fake, autograd, compile, vmap, autocast."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from njepa_kernels import available_impls, gather_tokens
from njepa_kernels._runtime import library
from njepa_kernels._runtime.dispatch import choose
from njepa_kernels.testing import all_cases, evaluate
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
OPS = list(available_impls())


def _runs(op: str, impl: str) -> bool:
    try:
        return choose(op, impl, CPU) == impl
    except RuntimeError:
        return False


FUSED = [(op, impl) for op in OPS for impl in ("native", "triton") if _runs(op, impl)]
each_fused = pytest.mark.parametrize(("op", "impl"), FUSED, ids=["-".join(pair) for pair in FUSED])


def _leaves(op: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A case with samples and noise, its tensors requiring gradients."""
    cases = [c for c in all_cases(op, small=True) if not c.size.startswith(("b0", "none"))]
    case = cases[1]
    inputs = case.make_inputs(CPU, dtype, 0)
    for name in case.differentiable:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    return case, inputs


def _calls(
    op: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Any, tuple[Any, ...]]]:
    """(operator, arguments) of every registered op that forward and backward of ``op`` call."""
    module = __import__(f"njepa_kernels.ops.{op}.op", fromlist=["op"])
    calls = []
    for attribute in ("_forward_op", "_backward_op", "_update_op"):
        if not hasattr(module, attribute):
            continue
        operator = getattr(module, attribute)

        def spy(*args: Any, _operator: Any = operator) -> Any:
            keep = tuple(
                a.detach().clone().requires_grad_(a.requires_grad)
                if isinstance(a, torch.Tensor)
                else a
                for a in args
            )
            calls.append((_operator, keep))
            return _operator(*args)

        monkeypatch.setattr(module, attribute, spy)
    case, inputs = _leaves(op)
    result = case.function(**inputs, impl=impl)
    roots = [t for t in case.outputs(result, inputs).values() if t.requires_grad]
    if roots:
        # A graph that is kept: the last backward of jepa_loss goes by its operator.
        torch.autograd.backward([root.sum() for root in roots], retain_graph=True)
    return calls


def test_namespace_is_one_constant() -> None:
    for op in OPS:
        assert hasattr(getattr(torch.ops, library.NAMESPACE), op)


@each_fused
def test_opcheck(op: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _calls(op, impl, monkeypatch)
    assert len(calls) == (2 if _leaves(op)[0].differentiable else 1)
    for operator, args in calls:
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        # The backward ops are not differentiable themselves.
        if "backward" not in str(operator):
            tests.append("test_aot_dispatch_dynamic")
        else:
            args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(operator, args, test_utils=tests)


class _Seen(TorchDispatchMode):
    """Counts the operators of this package that a dispatch mode gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == library.NAMESPACE:
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


@each_fused
def test_with_and_without_the_dispatcher_alike(op: str, impl: str) -> None:
    """A mode sees the operators; values do not depend on it."""
    case, inputs = _leaves(op)
    plain = evaluate(case, partial(case.function, impl=impl), inputs)
    with _Seen() as seen:
        watched = evaluate(case, partial(case.function, impl=impl), inputs)
    assert seen.names == ([op, f"{op}_backward"] if case.differentiable else [op])
    assert plain.keys() == watched.keys()
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name


def test_no_graph_without_grad() -> None:
    """Nothing is recorded where nothing asks for a gradient."""
    for op, impl in FUSED:
        case, inputs = _leaves(op)
        if not case.differentiable:
            continue
        with torch.no_grad():
            result = case.function(**inputs, impl=impl)
        assert not any(t.requires_grad for t in case.outputs(result, inputs).values()), op
        constants = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        result = case.function(**constants, impl=impl)
        assert not any(t.requires_grad for t in case.outputs(result, constants).values()), op


@each_fused
def test_no_second_derivative(op: str, impl: str) -> None:
    case, inputs = _leaves(op)
    if not case.differentiable:
        return
    result = case.function(**inputs, impl=impl)
    roots = [t for t in case.outputs(result, inputs).values() if t.requires_grad]
    leaves = [inputs[n] for n in case.differentiable if inputs[n] is not None]
    cotangents = [torch.ones_like(root, requires_grad=True) for root in roots]
    grads = torch.autograd.grad(roots, leaves, cotangents, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives: use impl='reference'"):
        torch.autograd.grad([g.sum() for g in grads[:1]], cotangents, allow_unused=True)


@each_fused
def test_autocast_changes_nothing(op: str, impl: str) -> None:
    case, inputs = _leaves(op)
    inputs = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    function = partial(case.function, impl=impl)
    plain = evaluate(case, function, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        under = evaluate(case, function, inputs)
    for name, value in plain.items():
        assert under[name].dtype == value.dtype, name
        assert torch.equal(under[name], value), name


@each_fused
def test_compiled_without_a_recompilation_per_step(op: str, impl: str) -> None:
    if op != "predictor_tokens":
        return
    torch.compiler.reset()
    case, inputs = _leaves(op)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(partial(case.function, impl=impl), backend=counter, fullgraph=True)
    for step in range(6):
        inputs["noise"] = inputs["noise"]._replace(step=2**33 + 17 * step)
        want = case.function(**inputs, impl=impl)
        assert torch.equal(compiled(**inputs), want)
    assert counter.frame_count <= 2  # with the step as a constant, then with a variable


@pytest.mark.parametrize("op", OPS)
def test_vmap_is_refused(op: str) -> None:
    case, inputs = _leaves(op)
    if op == "adamw_ema_":
        pytest.skip("as ema_update_; test_op_adamw_ema.py calls it")
    if op == "ema_update_":
        inputs = {"targets": torch.zeros(3), "sources": torch.zeros(3), "momentum": 0.5}
    tensors = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor)}
    names = [n for n, v in tensors.items() if v.is_floating_point()] or list(tensors)
    batched = [torch.stack((inputs[n], inputs[n])).detach() for n in names]

    def call(*tensors: Any) -> Any:
        given = inputs | dict(zip(names, tensors, strict=True))
        if op == "ema_update_":
            given |= {"targets": [given["targets"]], "sources": [given["sources"]]}
        return case.function(**given)

    with pytest.raises(RuntimeError, match=re.escape(f"{op}: torch.vmap is not supported")):
        torch.vmap(call)(*batched)


def test_the_dispatcher_refuses_vmap_too() -> None:
    op = getattr(torch.ops, library.NAMESPACE).gather_tokens
    idx = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"gather_tokens: torch\.vmap is not supported"):
        torch.vmap(lambda x: op(x, idx, None, "auto"))(torch.zeros(4, 2, 5, 6))


def test_an_op_without_fused_implementation_says_what_to_call() -> None:
    op = getattr(torch.ops, library.NAMESPACE).gather_tokens
    x, idx = torch.zeros(2, 5, 6, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"Call njepa_kernels\.gather_tokens"):
        op(x, idx, None, "auto")
    assert gather_tokens(x, idx).shape == (2, 3, 6)


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.to("meta")], ids=["cpu", "meta"])
def test_fake_gives_the_shapes_of_the_op(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with torch._subclasses.FakeTensorMode() as mode:
        x = mode.from_tensor(make(torch.zeros(2, 5, 6)))
        idx = mode.from_tensor(make(torch.zeros(2, 4, 3, dtype=torch.int64)))
        assert gather_tokens(x, idx).shape == (2, 4, 3, 6)
