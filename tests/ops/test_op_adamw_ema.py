"""adamw_ema_ against torch's fused AdamW followed by ema_update_, and what only it promises."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from njepa_kernels import Impl, adamw_ema_, available_impls, choose, ema_update_
from njepa_kernels._runtime import native
from njepa_kernels.ops.adamw_ema_.cases import _WRITTEN, _case
from njepa_kernels.testing import copy_inputs
from torch import Tensor

CPU = torch.device("cpu")
#: Multiples of 16 for the vectors, and what torch's fused AdamW computes one by one, in fp64.
SHAPES = [(64, 3), (32,), (5, 7), (16,)]


def _runs(impl: str) -> bool:
    try:
        return choose("adamw_ema_", impl, CPU) == impl
    except RuntimeError:
        return False


IMPLS: list[Any] = [impl for impl in available_impls()["adamw_ema_"] if _runs(impl)]
each_impl = pytest.mark.parametrize("impl", IMPLS)


def _inputs(dtype: torch.dtype = torch.float32, **change: Any) -> dict[str, Any]:
    return _case("some", SHAPES).make_inputs(CPU, dtype, 0) | change


def _apart(given: dict[str, Any], steps: int) -> dict[str, list[Tensor]]:
    """What torch.optim.AdamW and ema_update_ make of it."""
    leaves = [torch.nn.Parameter(p) for p in given["params"]]
    optimizer = torch.optim.AdamW(
        leaves, given["lr"], given["betas"], given["eps"], given["weight_decay"], fused=True
    )
    for i, leaf in enumerate(leaves):
        optimizer.state[leaf] = {
            "step": given["steps"][i],
            "exp_avg": given["exp_avgs"][i],
            "exp_avg_sq": given["exp_avg_sqs"][i],
        }
        leaf.grad = given["grads"][i]
    for _ in range(steps):
        optimizer.step()
        weights = [leaf.detach() for leaf in leaves]
        ema_update_(given["targets"], weights, given["momentum"], given["targets_bf16"])
    return given | {"params": weights, "params_bf16": [w.bfloat16() for w in weights]}


@each_impl
def test_within_rounding_of_adamw_and_the_average_apart(impl: Impl) -> None:
    together = _inputs()
    apart = _apart(copy_inputs(together), 5)
    for _ in range(5):
        adamw_ema_(**together, impl=impl)
    for name in _WRITTEN:
        tolerance = 2**-7 if name.endswith("bf16") else 3e-6
        for got, want in zip(together[name], apart[name], strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-9)
    assert together["steps"][0] == 12


def _vectors() -> bool:
    return native.available("adamw_ema_", "cpu") == "yes" and "AVX" in (
        torch.backends.cpu.get_cpu_capability()
    )


@pytest.mark.skipif(not _vectors(), reason="torch rounds twice where there is no FMA")
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.95)], ids=str)
def test_native_has_the_bits_of_adamw_and_the_average_apart(betas: tuple[float, float]) -> None:
    """But for the last ``numel % 16`` values."""
    together = _inputs(betas=betas)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch deals a tensor out to its threads, each with its own rest
    try:
        apart = _apart(copy_inputs(together), 3)
    finally:
        torch.set_num_threads(threads)
    for _ in range(3):
        adamw_ema_(**together, impl="native")
    for name in _WRITTEN:
        for got, want in zip(together[name], apart[name], strict=True):
            same = got.numel() // 16 * 16
            assert torch.equal(got.flatten()[:same], want.flatten()[:same]), name


@each_impl
def test_a_bad_step_changes_nothing(impl: Impl) -> None:
    for flag in (torch.tensor(True), torch.tensor(1.0)):
        inputs = _inputs(found_inf=flag)
        inputs["grads"][1][3] = float("nan")
        inputs["targets_bf16"][0].zero_()  # stale copies are not refreshed either
        before = copy_inputs(inputs)
        adamw_ema_(**inputs, impl=impl)
        for name in _WRITTEN:
            assert all(map(torch.equal, inputs[name], before[name])), name


@each_impl
def test_numbers_as_tensors_are_the_numbers(impl: Impl) -> None:
    plain = _inputs(found_inf=torch.tensor(False))
    tensors = copy_inputs(plain)
    for name in ("lr", "weight_decay", "momentum"):
        tensors[name] = torch.tensor(plain[name], dtype=torch.float64)
    adamw_ema_(**plain, impl=impl)
    adamw_ema_(**tensors, impl=impl)
    for name in _WRITTEN:
        assert all(map(torch.equal, plain[name], tensors[name])), name


@each_impl
def test_the_scale_is_that_of_the_gradients_which_stay(impl: Impl) -> None:
    scaled = _inputs(scale=torch.tensor(0.25))
    plain = copy_inputs(scaled) | {"scale": None}
    grads = [grad.clone() for grad in scaled["grads"]]
    plain["grads"] = [0.25 * grad for grad in grads]
    adamw_ema_(**scaled, impl=impl)
    adamw_ema_(**plain, impl=impl)
    assert all(map(torch.equal, scaled["grads"], grads))
    for name in _WRITTEN:
        assert all(map(torch.equal, scaled[name], plain[name])), name


@each_impl
def test_every_tensor_has_its_own_count(impl: Impl) -> None:
    """As of parameters that got no gradient in some steps."""
    inputs = _inputs()
    for i, step in enumerate(inputs["steps"]):
        step.fill_(i * i)
    alone = [
        {name: x[i : i + 1] if isinstance(x, list) else x for name, x in copied.items()}
        for i in range(len(SHAPES))
        if (copied := copy_inputs(inputs))
    ]
    adamw_ema_(**inputs, impl=impl)
    for i, one in enumerate(alone):
        adamw_ema_(**one, impl=impl)
        assert torch.equal(one["params"][0], inputs["params"][i])


def test_parameters_are_updated_outside_autograd() -> None:
    inputs = _inputs()
    inputs["params"] = [torch.nn.Parameter(p) for p in inputs["params"]]
    version = inputs["params"][0]._version
    adamw_ema_(**inputs)
    assert inputs["params"][0].grad_fn is None
    assert inputs["params"][0]._version > version


def test_vmap_is_refused() -> None:
    def call(p: Tensor) -> None:
        adamw_ema_([p], [p], [p], [p], [torch.zeros(())], lr=0.1)

    with pytest.raises(RuntimeError, match=r"adamw_ema_: torch\.vmap is not supported"):
        torch.vmap(call)(torch.zeros(2, 3))


def _short(name: str) -> dict[str, Any]:
    return {name: _inputs()[name][:2]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_short("grads"), ValueError, "grads must have 4 tensors, as params has, got 2"),
        (_short("targets_bf16"), ValueError, "targets_bf16 must have 4 tensors"),
        ({"params": [p.half() for p in _inputs()["params"]]}, TypeError, "params[0] must be float"),
        ({"exp_avgs": [torch.zeros(2)] * 4}, ValueError, "exp_avgs[0] must be [*,*] = [64, 3]"),
        ({"steps": [torch.zeros(1)] * 4}, ValueError, "steps[0] must be [] = [], got [1]"),
        ({"steps": [torch.tensor(1)] * 4}, TypeError, "steps[0] must be float32, got int64"),
        ({"targets": None}, ValueError, "targets_bf16 are copies of targets, which are None"),
        ({"lr": -1.0}, ValueError, "lr must be in [0, inf], got -1.0"),
        ({"weight_decay": torch.ones(1)}, TypeError, "weight_decay must be a float or a 0-dim"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be in [0, 1), got (0.9, 1.0)"),
        ({"momentum": torch.tensor(1.5)}, ValueError, "momentum must be in [0, 1], got 1.5"),
        ({"found_inf": torch.zeros(1)}, ValueError, "found_inf must be [] = [], got [1]"),
    ],
)
def test_bad_arguments_change_nothing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = _inputs() | change
    before = copy_inputs(inputs)
    with pytest.raises(error, match=re.escape(message)):
        adamw_ema_(**inputs)
    assert all(map(torch.equal, inputs["exp_avg_sqs"], before["exp_avg_sqs"]))


@pytest.mark.skipif(native.available("adamw_ema_", "cpu") != "yes", reason="is not built")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": [torch.zeros(3)]}, "all lists must be of one length"),
        ({"exp_avgs": [torch.zeros(2)] * 4}, "contiguous of the sizes of params"),
        ({"targets": []}, "targets_bf16 without targets"),
    ],
)
def test_the_library_checks_what_it_would_read(change: dict[str, Any], message: str) -> None:
    """Also for who calls it without the checks above."""
    inputs = _inputs() | change
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", *_WRITTEN[4:])
    lists = [inputs[name] for name in names]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        native.ops().adamw_ema_(*lists, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.9, 0.1, 1.0)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_launches_one_kernel_for_all_tensors_and_reads_nothing() -> None:
    """Meta tensors have no values to read."""
    from njepa_kernels._runtime.launch import record_launches
    from njepa_kernels.ops.adamw_ema_ import triton_kernel

    case = _case("many", [(3,), (0, 2), *[(5000,)] * 200])
    inputs = case.make_inputs(torch.device("meta"), torch.bfloat16, 0)
    numbers = [torch.empty((), dtype=torch.float64, device="meta") for _ in range(3)]
    bad = torch.empty((), device="meta")
    with record_launches(90) as launches:
        triton_kernel.update(
            *(inputs[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")),
            *(inputs[name] for name in ("targets", "params_bf16", "targets_bf16")),
            numbers[0], inputs["betas"], inputs["eps"], *numbers[1:], None, bad,
        )  # fmt: skip
    names = [launch.kernel.__name__ for launch in launches]
    assert names.count("_adamw_ema_kernel") == 1
    assert launches[-1].grid == (1 + 5 * 200,)
    assert set(names[:-1]) == {"_write_row_kernel"}
