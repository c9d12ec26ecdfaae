"""Every op on a GPU, with each implementation that runs there: values, gradients, graphs, syncs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from njepa_kernels import adamw_ema_, debug_checks, predictor_tokens
from njepa_kernels._runtime.dispatch import IMPLEMENTATIONS, choose
from njepa_kernels.ops.adamw_ema_.cases import _case as adamw_case
from njepa_kernels.ops.ema_update_.cases import _case as ema_case
from njepa_kernels.ops.gather_tokens.cases import _case as gather_case
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.predictor_tokens.cases import _case as predictor_case
from njepa_kernels.ops.vicreg.cases import _case as vicreg_case
from njepa_kernels.testing import (
    OpCase,
    all_cases,
    assert_case_within_baseline,
    copy_inputs,
    evaluate,
)

from tests.support.noise_checks import check_draws, noise_of
from tests.support.special_checks import INDEXED, check_nan, check_stray_index

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    *all_cases(small=True),
    *(predictor_case(f"b2-m2-kc3-kt2-n9-d{d}", 2, 2, 3, 2, 9, d) for d in (1, 5, 520, 2048, 2304)),
    *(
        loss_case(f"b2-m2-kt2-n9-d{d}" + "-noised" * noised, 2, 2, 2, 9, d, noised=noised)
        for d in (1, 513, 2048, 2304)
        for noised in (False, True)
    ),
    *(gather_case(f"b2-n9-k4-d{d}", 2, 9, 4, d) for d in (1, 513, 2304)),
    vicreg_case("m2-n9-d2304", 2, 9, 2304),
    ema_case("three-hundred", [(4097,), (12288,), *[(3, 5)] * 300]),
]
FUSED = tuple(impl for impl in IMPLEMENTATIONS if impl != "reference")


def _runs(op: str, impl: str) -> bool:
    try:
        return choose(op, impl, CUDA) == impl
    except RuntimeError:
        return False


#: Found out once; on a machine without a GPU everything here is skipped and nothing is asked.
PAIRS = [
    (case, impl)
    for case in CASES
    for impl in IMPLEMENTATIONS
    if not torch.cuda.is_available() or _runs(case.op, impl)
]
each_pair = pytest.mark.parametrize(
    ("case", "impl"), PAIRS, ids=[f"{case.name}-{impl}" for case, impl in PAIRS]
)
each_fused_pair = pytest.mark.parametrize(
    ("case", "impl"),
    [pair for pair in PAIRS if pair[1] in FUSED],
    ids=[f"{case.name}-{impl}" for case, impl in PAIRS if impl in FUSED],
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", ["predictor_tokens", "jepa_loss", "ema_update_"])
def test_the_native_library_runs_here(op: str) -> None:
    # Without it the pairs below would leave it out, and pass.
    assert choose(op, "native", CUDA) == "native"


@each_dtype
@each_pair
def test_values_and_gradients_are_within_the_baseline(
    case: OpCase, impl: str, dtype: torch.dtype
) -> None:
    function = partial(case.function, impl=impl)
    assert_case_within_baseline(case, function, CUDA, dtype, range(3), impl)


@each_dtype
@each_fused_pair
def test_two_runs_give_the_same_bits(case: OpCase, impl: str, dtype: torch.dtype) -> None:
    inputs = case.make_inputs(CUDA, dtype, 3)
    first, second = (evaluate(case, partial(case.function, impl=impl), inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(7.0), second[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_noise_per_block_and_shared(impl: str) -> None:
    if not _runs("predictor_tokens", impl):
        pytest.skip(f"{impl} does not run here")
    check_draws(noise_of(partial(predictor_tokens, impl=impl)), device="cuda")


@each_fused_pair
def test_the_host_never_waits(case: OpCase, impl: str) -> None:
    inputs = case.make_inputs(CUDA, torch.bfloat16, 4)
    function = partial(case.function, impl=impl)
    leaves = _leaves(case, inputs)
    cotangents = _cotangents(_step(case, function, inputs, leaves)[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(case, function, inputs, leaves, cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _leaves(case: OpCase, inputs: dict[str, Any]) -> list[torch.Tensor]:
    names = [name for name in case.differentiable if inputs[name] is not None]
    return [inputs[name].requires_grad_() for name in names]


def _step(
    case: OpCase,
    function: Any,
    inputs: dict[str, Any],
    leaves: list[torch.Tensor],
    cotangents: list[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """The outputs, and with ``cotangents`` (of those with a gradient) the gradients."""
    outputs = list(case.outputs(function(**inputs), inputs).values())
    roots = [out for out in outputs if out.requires_grad]
    if not roots or cotangents is None:
        return outputs, ()
    return outputs, torch.autograd.grad(roots, leaves, cotangents)


def _cotangents(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.ones_like(out) for out in outputs if out.requires_grad]


@each_fused_pair
def test_a_captured_graph_gives_the_bits_of_the_calls(case: OpCase, impl: str) -> None:
    if case.size.startswith(("b0", "none")):
        pytest.skip("nothing is launched")
    function = partial(case.function, impl=impl)
    inputs = case.make_inputs(CUDA, torch.bfloat16, 5)
    start = copy_inputs(inputs)
    leaves = _leaves(case, inputs)
    # Once before the capture, on another stream: kernels load, tables are copied.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cotangents = _cotangents(_step(case, function, inputs, leaves)[0])
        _step(case, function, inputs, leaves, cotangents)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, grads = _step(case, function, inputs, leaves, cotangents)

    def reset() -> None:
        with torch.no_grad():
            for name, value in start.items():
                for old, new in zip(_list(inputs[name]), _list(value), strict=True):
                    old.copy_(new)

    torch.empty(1 << 22, device=CUDA).fill_(float("nan"))  # over what the capture let go
    for _ in range(2):
        reset()
        graph.replay()
        replayed = [tensor.clone() for tensor in (*outputs, *grads)]
        reset()
        again, again_grads = _step(case, function, inputs, leaves, cotangents)
        expected = [*again, *again_grads]
        assert len(replayed) == len(expected) > 0
        for got, want in zip(replayed, expected, strict=True):
            assert torch.equal(got, want)


def _list(value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, torch.Tensor)]


@pytest.mark.parametrize("impl", FUSED)
def test_ema_takes_a_momentum_on_the_device_without_waiting(impl: str) -> None:
    if not _runs("ema_update_", impl):
        pytest.skip(f"{impl} does not run here")
    case = ema_case("some", [(4097,), (3, 5)])
    inputs = case.make_inputs(CUDA, torch.float32, 0)
    number, tensor = copy_inputs(inputs), copy_inputs(inputs)
    tensor["momentum"] = torch.tensor(0.996, dtype=torch.float64, device=CUDA)
    case.function(**number, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.function(**tensor, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(number["targets"], tensor["targets"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_adamw_takes_numbers_of_either_device_without_waiting(device: str) -> None:
    inputs = adamw_case("some", [(4097,), (3, 5)], bad=False).make_inputs(CUDA, torch.float32, 0)
    plain = copy_inputs(inputs)
    adamw_ema_(**plain, impl="triton")
    for name in ("lr", "weight_decay", "momentum"):
        inputs[name] = torch.tensor(inputs[name], dtype=torch.float64, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw_ema_(**inputs, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("params", "exp_avg_sqs", "targets", "targets_bf16"):
        assert all(map(torch.equal, inputs[name], plain[name])), name


@each_dtype
@each_fused_pair
def test_an_index_out_of_range_gives_nan(case: OpCase, impl: str, dtype: torch.dtype) -> None:
    """Without debug checks; a read outside of all memory would end the process with an error."""
    if case.op not in INDEXED:
        pytest.skip("has no index")
    check_stray_index(case, partial(case.function, impl=impl), case.make_inputs(CUDA, dtype, 0))
    torch.cuda.synchronize()


@each_dtype
@each_fused_pair
def test_nan_shows_where_it_shows_in_the_reference(
    case: OpCase, impl: str, dtype: torch.dtype
) -> None:
    if case.op in ("patchify", "ema_update_", "adamw_ema_"):
        pytest.skip("one element in, one element out")
    check_nan(case, partial(case.function, impl=impl), case.make_inputs(CUDA, dtype, 0))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("op", ["gather_tokens", "predictor_tokens", "jepa_loss"])
def test_debug_checks_name_an_index_out_of_range(op: str, impl: str) -> None:
    if not _runs(op, impl):
        pytest.skip(f"{impl} of {op} does not run here")
    case = all_cases(op, small=True)[0]
    inputs = case.make_inputs(CUDA, torch.float32, 0)
    name = "idx" if op == "gather_tokens" else "target_idx"
    inputs[name] = torch.full_like(inputs[name], 10_000)
    debug_checks(True)
    try:
        with pytest.raises(ValueError, match=rf"{op}: {name} must be int64 in .*, got 10000"):
            case.function(**inputs, impl=impl)
    finally:
        debug_checks(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", ["predictor_tokens", "jepa_loss", "ema_update_"])
def test_the_kernels_run_on_the_device_of_the_tensors(op: str) -> None:
    other = torch.device("cuda:1")
    case = all_cases(op, small=True)[0]
    results = []
    for device in (CUDA, other):
        inputs = case.make_inputs(device, torch.float32, 0)
        results.append(evaluate(case, partial(case.function, impl="native"), inputs))
    for name, value in results[0].items():
        assert results[1][name].device == other
        assert torch.equal(value, results[1][name].to(CUDA))


# Native CUDA, and ema_update_: bad indices, tensors that move, graphs that outlive caches


@each_dtype
@pytest.mark.parametrize("op", ["predictor_tokens", "jepa_loss"])
def test_native_gives_nan_for_an_index_out_of_range(op: str, dtype: torch.dtype) -> None:
    """Nothing is read outside (compute-sanitizer sees it), and only the row itself is spoilt."""
    make = predictor_case if op == "predictor_tokens" else loss_case
    sizes = (3, 2, 7, 7, 9, 48) if op == "predictor_tokens" else (3, 2, 7, 9, 48)
    case = make("bad", *sizes)  # type: ignore[operator]
    good = case.make_inputs(CUDA, dtype, 1)
    bad = torch.zeros(3, 2, 7, dtype=torch.bool, device=CUDA)
    bad[0, 1, 2] = bad[2, 0, 6] = True
    values = torch.tensor([2**40, -(2**63), -1, 9, 10, 2**31 + 3, 2**63 - 1], device=CUDA)
    broken = good | {"target_idx": torch.where(bad, values.expand(3, 2, 7), good["target_idx"])}
    want, got = (case.function(**inputs, impl="native") for inputs in (good, broken))
    if op == "jepa_loss":
        assert bool(got.loss.isnan())
        assert bool(want.loss.isfinite())
        return
    rows = torch.cat((bad.new_zeros(2, 3, 7), bad.transpose(0, 1)), dim=2).flatten(0, 1)
    assert bool(got[rows].isnan().all())
    assert torch.equal(got[~rows], want[~rows])


@pytest.mark.parametrize("impl", FUSED)
def test_ema_of_sources_that_move_never_waits(impl: str) -> None:
    if not _runs("ema_update_", impl):
        pytest.skip(f"{impl} does not run here")
    case = ema_case("some", [(4097,), (3, 5)])
    inputs = case.make_inputs(CUDA, torch.bfloat16, 0)
    moved = copy_inputs(inputs)
    case.function(**inputs, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.function(**moved, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(inputs["targets"], moved["targets"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", FUSED)
def test_a_graph_of_ema_needs_no_call_before_and_no_cache_after(impl: str) -> None:
    if not _runs("ema_update_", impl):
        pytest.skip(f"{impl} does not run here")
    case = ema_case("some", [(4097,), (3, 5)])
    warm = case.make_inputs(CUDA, torch.bfloat16, 0)
    case.function(**warm, impl=impl)  # kernels load; these tensors are not those of the graph
    inputs = case.make_inputs(CUDA, torch.bfloat16, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.function(**inputs, impl=impl)
    for _ in range(100):  # other lists, more than any cache holds
        other = case.make_inputs(CUDA, torch.bfloat16, 1)
        case.function(**other, impl=impl)
    graph.replay()
    for a, b in zip(inputs["targets"], warm["targets"], strict=True):
        assert torch.equal(a, b)
