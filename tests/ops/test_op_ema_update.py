"""ema_update_ against the formula in double precision."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from njepa_kernels import ema_update_
from njepa_kernels.ops.ema_update_ import op as ema_op
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(4,), (3, 5), (), (0,), (2, 2, 2)]


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "targets": [torch.randn(shape) for shape in SHAPES],
        "sources": [torch.randn(shape).to(dtype) for shape in SHAPES],
        "momentum": 0.996,
        "shadow": [torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES],
    }


def _momenta() -> list[Any]:
    values: list[Any] = [0.0, 0.5, 0.996, 0.99999, 1.0, 1]
    return [*values, torch.tensor(0.996, dtype=torch.float64), torch.tensor(0.75)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("momentum", _momenta(), ids=str)
def test_formula(momentum: float | torch.Tensor, dtype: torch.dtype) -> None:
    inputs = _inputs(dtype) | {"momentum": momentum}
    before = [t.clone() for t in inputs["targets"]]
    m = float(momentum)
    assert ema_update_(**inputs) is None  # type: ignore[func-returns-value]
    for i, (target, source) in enumerate(zip(before, inputs["sources"], strict=True)):
        exact = m * target.double() + (1.0 - m) * source.double()
        got = inputs["targets"][i]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=3e-7, atol=3e-7)
        assert torch.equal(inputs["shadow"][i], got.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreach_equals_the_loop_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype) | {"shadow": None}
    looped = [t.clone() for t in inputs["targets"]]
    for target, source in zip(looped, inputs["sources"], strict=True):
        target.mul_(0.996).add_(source.float(), alpha=1.0 - 0.996)
    ema_update_(**inputs, impl="reference")
    assert all(torch.equal(a, b) for a, b in zip(inputs["targets"], looped, strict=True))


@pytest.mark.parametrize("momentum", [0.99999, torch.tensor(0.99999, dtype=torch.float64)], ids=str)
def test_one_minus_momentum_is_not_taken_in_fp32(momentum: float | torch.Tensor) -> None:
    target = torch.zeros(1)
    ema_update_([target], [torch.ones(1)], momentum)
    assert target.item() == pytest.approx(1e-5, rel=1e-6)


def test_many_small_steps_do_not_stall() -> None:
    """In fp32 the mean follows; in bf16 steps of 0.4 % would be rounded away."""
    targets, shadow = [torch.zeros(8)], [torch.zeros(8, dtype=torch.bfloat16)]
    for _ in range(2000):
        ema_update_(targets, [torch.ones(8)], 0.999, shadow)
    torch.testing.assert_close(targets[0], torch.full((8,), 1 - 0.999**2000), rtol=1e-4, atol=0)
    assert torch.equal(shadow[0], targets[0].bfloat16())


def test_parameters_are_updated_outside_autograd() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    source = torch.nn.Parameter(torch.ones(3))
    ema_update_([parameter], [source], 0.75)
    assert parameter.tolist() == [0.25] * 3
    assert parameter.requires_grad
    assert parameter.grad_fn is None


@pytest.mark.parametrize("shadow", [None, []])
def test_empty_lists_are_no_error(shadow: list[torch.Tensor] | None) -> None:
    """As of a module without parameters; the lists stay empty."""
    targets: list[torch.Tensor] = []
    ema_update_(targets, [], 0.9, shadow)
    assert targets == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"sources": []},
            ValueError,
            "ema_update_: sources must have 5 tensors, as targets has, got 0",
        ),
        ({"shadow": []}, ValueError, "shadow must have 5 tensors, as targets has, got 0"),
        (
            {"targets": [torch.zeros(s).half() for s in SHAPES]},
            TypeError,
            "targets[0] must be float32, got float16",
        ),
        (
            {"sources": [torch.zeros(s) for s in [*SHAPES[:-1], (2, 2)]]},
            ValueError,
            "sources[4] must be [*,*,*] = [2, 2, 2], got [2, 2]",
        ),
        (
            {"sources": [torch.zeros(s).int() for s in SHAPES]},
            TypeError,
            "sources[0] must be float32 or",
        ),
        (
            {"shadow": [torch.zeros(s) for s in SHAPES]},
            TypeError,
            "shadow[0] must be bfloat16, got float32",
        ),
        ({"momentum": 1.5}, ValueError, "momentum must be in [0, 1], got 1.5"),
        ({"momentum": float("nan")}, ValueError, "momentum must be in [0, 1], got nan"),
        ({"momentum": torch.tensor(-0.5)}, ValueError, "momentum must be in [0, 1], got -0.5"),
        ({"momentum": torch.ones(1)}, TypeError, "momentum must be a float or a 0-dim floating"),
        ({"impl": "triton"}, RuntimeError, "ema_update_: impl='triton' cannot run"),
    ],
)
def test_bad_arguments_change_nothing(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = _inputs() | change
    before = [t.clone() for t in inputs["targets"]]
    with pytest.raises(error, match=re.escape(message)):
        ema_update_(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs["targets"], before, strict=True))


def test_a_list_that_fits_costs_one_expression_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks that word a message took 1.8 ms for the 292 tensors of a ViT-L."""
    calls: list[str] = []
    monkeypatch.setattr(ema_op, "check_like", lambda op, name, *rest: calls.append(name))
    inputs = _inputs()
    ema_update_(**inputs)
    assert calls == []
    inputs["shadow"][2] = inputs["shadow"][2].half()
    inputs["sources"][3] = "none"
    ema_op._check_tensors("ema_update_", *(inputs[n] for n in ("targets", "sources", "shadow")))
    assert calls == ["sources[3]", "shadow[2]"]


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_addresses_reach_the_device_as_arguments_of_kernels() -> None:
    """So nothing is copied from the host, only what moved is written, and a graph has its own."""
    from njepa_kernels._runtime import address_rows
    from njepa_kernels._runtime.launch import record_launches
    from njepa_kernels.ops.ema_update_ import triton_kernel

    sizes = [5000, 1, *[3] * 290]
    targets, sources, moved = ([torch.zeros(n) for n in sizes] for _ in range(3))
    shadow = [torch.zeros(n, dtype=torch.bfloat16) for n in sizes]
    on_cpu = torch.tensor(0.99999, dtype=torch.float64)
    stream: int | None = 0
    with pytest.MonkeyPatch.context() as patch, record_launches(90) as launches:
        patch.setattr(address_rows, "_keeping_stream", lambda device: stream)
        address_rows._kept.cache_clear()

        def written(given: list[torch.Tensor], momentum: Any = 0.9) -> list[list[int]]:
            """The rows that a call writes: what its launches would store."""
            launches.clear()
            rates = ema_op.host_rates(momentum, torch.device("cuda"))
            with _Operators() as operators:
                triton_kernel.update(targets, given, *rates, shadow)
            assert set(operators.names) <= {"aten::empty.memory_format", "aten::slice.Tensor"}
            *writes, last = launches
            assert last.kernel.__name__ == "_ema_update_kernel"
            assert all(w.kernel.__name__ == "_write_row_kernel" for w in writes)
            values = [(v - 2**62) >> 1 for w in writes for v in w.args[1]]
            # 292 values in three launches of 128.
            return [values[i : i + 292] for i in range(0, len(values), 384)]

        def addresses(tensors: list[torch.Tensor]) -> list[int]:
            return [tensor.data_ptr() for tensor in tensors]

        first = [0, 2, *range(3, 293)]
        rows = [*map(addresses, (targets, sources, shadow)), sizes, first]
        assert written(sources) == rows
        assert written(sources) == []
        assert written(moved) == [addresses(moved)]
        assert written(sources, on_cpu) == []
        assert launches[-1].args[-4:-1] == (None, 0.99999, 1 - 0.99999)
        stream = 1
        assert written(sources) == rows
        stream = None
        for _ in range(2):
            assert written(sources) == rows
        address_rows._kept.cache_clear()
