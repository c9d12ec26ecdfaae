"""What tests and benchmarks of the ops share: the list of cases and one rule for the tolerance.

``all_cases()`` is the only registry: whoever iterates it covers every op. A case is a size of an op
with a maker of inputs; it carries the public function, the reference (the specification) and
``eager``, the same formula composed the way the published code does it (the baseline).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ._runtime.dispatch import OPS

Mode = Literal["fwd", "fwdbwd"]
Inputs = dict[str, Any]


def result_tensors(result: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The tensors a call returned, by name."""
    if isinstance(result, torch.Tensor):
        return {"out": result}
    return {name: value for name, value in result._asdict().items() if value is not None}


@dataclass(frozen=True)
class OpCase:
    """One op at one size.

    ``make_inputs(device, dtype, seed)`` gives keyword arguments for all three functions; ``dtype``
    is that of the activations. ``bytes(dtype, mode)`` is the least memory traffic the op can have,
    ``flops(mode)`` its floating-point operations (without the integer work of the noise), forward
    or forward and backward. ``small`` cases are for tests, the others for benchmarks, on the types
    of device in ``devices``. ``is_derivative``: whether the gradients are those of the outputs,
    which a stopped gradient is not.
    """

    op: str
    size: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    make_inputs: Callable[[torch.device, torch.dtype, int], Inputs]
    bytes: Callable[[torch.dtype, Mode], int]
    flops: Callable[[Mode], int]
    differentiable: tuple[str, ...] = ()
    small: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    outputs: Callable[[Any, Inputs], dict[str, torch.Tensor]] = result_tensors
    is_derivative: bool = True

    @property
    def name(self) -> str:
        return f"{self.op}-{self.size}"


@dataclass(frozen=True)
class VitSize:
    """What the ops see of a Vision Transformer at 224 pixels.

    ``context`` and ``targets`` are tokens per image and per target block: the means of the
    published mask sampler at batch 128 (docs/method.md), rounded.
    """

    width: int
    depth: int
    patch: int
    context: int
    targets: int
    predictor_width: int = 384

    @property
    def patches(self) -> int:
        return (224 // self.patch) ** 2


VITS = {
    "vits16": VitSize(384, 12, 16, 51, 33),
    "vitb16": VitSize(768, 12, 16, 51, 33),
    "vitl16": VitSize(1024, 24, 16, 51, 33),
    "vith14": VitSize(1280, 32, 14, 71, 44),
}
#: Images per step of the benchmarks, by the type of device.
BATCHES = {"cpu": 8, "cuda": 128}


def vit_sizes() -> list[tuple[str, VitSize, int, tuple[str, ...]]]:
    """Name, ViT, batch and devices of the benchmark sizes: vits16-224-b8 to vith14-224-b128."""
    return [
        (f"{name}-224-b{batch}", vit, batch, (device,))
        for device, batch in BATCHES.items()
        for name, vit in VITS.items()
    ]


def all_cases(op: str | None = None, *, small: bool | None = None) -> list[OpCase]:
    """The cases of one op or of all, optionally only the small or only the large ones."""
    cases: list[OpCase] = []
    for name in OPS if op is None else (op,):
        cases += importlib.import_module(f".ops.{name}.cases", __package__).CASES
    return [case for case in cases if small is None or case.small == small]


def draw_indices(batch: int, n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [batch, k]: distinct, ascending indices in [0, n), as masks have them."""
    return torch.rand(batch, n, generator=generator).argsort(dim=1)[:, :k].sort(dim=1).values


def distinct_rows(n: int, k: int, m: int = 1) -> int:
    """How many of n rows m independent draws of k distinct ones name at least once, on average."""
    return round(n * (1.0 - (1.0 - min(k / n, 1.0)) ** m))


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Every floating tensor (also inside lists) in ``dtype``; a copy, the rest as it is.

    A type among the inputs, which the op shall return, becomes ``dtype`` too.
    """

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().to(dtype, copy=True)
        if isinstance(value, torch.dtype):
            return dtype
        return [cast(item) for item in value] if isinstance(value, list) else value

    return {name: cast(value) for name, value in inputs.items()}


def copy_inputs(inputs: Inputs) -> Inputs:
    """Inputs of their own storage, so that an op that writes in place can run again."""

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        return [copy(item) for item in value] if isinstance(value, list) else value

    return {name: copy(value) for name, value in inputs.items()}


def evaluate(
    case: OpCase, function: Callable[..., Any], inputs: Inputs, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The outputs of ``function``, and as "d name" the gradients of the differentiable inputs.

    The outputs are contracted with fixed random cotangents, the same for every implementation and
    type. ``inputs`` is left as it is.
    """
    inputs = copy_inputs(inputs)
    leaves = {
        name: inputs[name].requires_grad_()
        for name in case.differentiable
        if inputs.get(name) is not None
    }
    outputs = case.outputs(function(**inputs), inputs)
    generator = torch.Generator().manual_seed(seed)
    roots, cotangents = [], []
    for tensor in outputs.values():
        if tensor.requires_grad:
            # Multiples of 1/16 up to 2: exact in every type, so that all see the same cotangents.
            cotangent = torch.randint(-32, 33, tensor.shape, generator=generator) / 16.0
            roots.append(tensor)
            cotangents.append(cotangent.to(tensor))
    values = {name: tensor.detach() for name, tensor in outputs.items()}
    if roots:
        grads = torch.autograd.grad(roots, list(leaves.values()), cotangents)
        values |= {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return values


def stack_values(values: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The results of several seeds as one: a lone scalar says little about a rounding error."""
    return {name: torch.stack([value[name] for value in values]) for name in values[0]}


def assert_within_baseline(
    candidate: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    dtype: torch.dtype,
    what: str,
) -> None:
    """max |candidate - exact| <= 2 max |eager - exact| + eps(dtype) max |exact|.

    ``exact`` comes from the fp64 reference on the same (rounded) inputs, ``eager`` from the plain
    composition in the same type as ``candidate``: so the bound follows what the type can do and
    needs no hand-set tolerance. Values that are not finite must be the same ones.
    """
    if candidate.shape != exact.shape or eager.shape != exact.shape:
        raise AssertionError(
            f"{what}: shapes differ: candidate {list(candidate.shape)}, eager {list(eager.shape)}, "
            f"exact {list(exact.shape)}"
        )
    if exact.numel() == 0:
        return
    got, base, truth = (tensor.double().cpu() for tensor in (candidate, eager, exact))
    finite = truth.isfinite()
    same = torch.equal(got.isfinite(), finite) and torch.equal(
        got[~finite].nan_to_num(0.0), truth[~finite].nan_to_num(0.0)
    )
    if not same:
        raise AssertionError(f"{what}: non-finite values differ from those of the fp64 reference")
    error = torch.where(finite, (got - truth).abs(), 0.0)
    base_error = torch.where(finite & base.isfinite(), (base - truth).abs(), 0.0)
    scale = float(torch.where(finite, truth.abs(), 0.0).max())
    bound = 2.0 * float(base_error.max()) + torch.finfo(dtype).eps * scale
    if float(error.max()) <= bound:
        return
    worst = torch.unravel_index(error.argmax(), error.shape)
    index = tuple(int(i) for i in worst)
    rms = float(error.square().mean().sqrt())
    base_rms = float(base_error.square().mean().sqrt())
    ratio = rms / base_rms if base_rms else float("inf")
    raise AssertionError(
        f"{what}: max abs error {float(error.max()):.3e} > bound {bound:.3e} "
        f"(eager {float(base_error.max()):.3e}, scale {scale:.3e}, {dtype}); "
        f"RMS error is {ratio:.2f} x eager; worst at {index}: "
        f"got {float(got[index])!r}, expected {float(truth[index])!r}"
    )


def assert_case_within_baseline(
    case: OpCase,
    function: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    seeds: Sequence[int],
    what: str = "",
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """``assert_within_baseline`` for all values and gradients of ``function`` over the seeds.

    Returns:
        Those of ``function`` and of ``eager``, stacked.
    """
    candidate, eager, exact = [], [], []
    for seed in seeds:
        inputs = case.make_inputs(device, dtype, seed)
        candidate.append(evaluate(case, function, inputs, seed))
        eager.append(evaluate(case, case.eager, inputs, seed))
        exact.append(evaluate(case, case.reference, cast_inputs(inputs, torch.float64), seed))
    got, base, truth = (stack_values(values) for values in (candidate, eager, exact))
    assert got.keys() == base.keys() == truth.keys()
    for name, value in truth.items():
        # Rounded to the type of the result: fp32 for a loss, whatever type the inputs have.
        label = " ".join(filter(None, (case.name, what, name)))
        assert_within_baseline(got[name], base[name], value, got[name].dtype, label)
    return got, base
