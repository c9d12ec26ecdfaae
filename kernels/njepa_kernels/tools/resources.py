"""Registers, shared memory and spills of every GPU kernel, compiled ahead of time.

    python -m njepa_kernels.tools.resources [--arch 80 90] [--size vitl16] [--dtype bfloat16]

No GPU is needed: the benchmark cases of the ops run on tensors without data, what they would launch
is compiled by Triton for the architecture asked for, and its ``cuobjdump`` reads the result. So it
does with the CUDA kernels of the native library, where that is built; they are the same for every
size.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .._runtime import dispatch
from .._runtime.dispatch import OPS, backend
from .._runtime.library import kernels
from .._runtime.native import LIBRARIES
from ..testing import Inputs, OpCase, all_cases, evaluate

if TYPE_CHECKING:
    from .._runtime.launch import Launch

ARCHITECTURES = (80, 90, 100)
#: Bytes of shared memory one program may use (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. ``local``: bytes per thread in local memory, 0: no spills.

    For a kernel of the native library ``size`` is "native", ``dtype`` and ``warps`` are unknown.
    """

    kernel: str
    size: str
    dtype: str
    arch: int
    constants: str
    registers: int
    shared: int
    local: int
    warps: int


class _RunLaunchers(TorchDispatchMode):
    """Runs what an operator of the package runs on a GPU, where a meta tensor gets its fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kernels.get(func, func)(*args, **(kwargs or {}))


def _planes(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def _variants(op: str, inputs: Inputs) -> list[Inputs]:
    """The inputs of a case, and what is compiled apart but is no size of its own."""
    changes: dict[str, Callable[[], Inputs]] = {
        "patchify": lambda: {"images": _planes(inputs["images"])},
        "gather_tokens": lambda: {"pos": None},
        "predictor_tokens": lambda: {"noise": inputs["noise"]._replace(shared=True)},
        "add_layer_norm": lambda: {"x": inputs["residual"], "residual": None},
        "bias_gelu": lambda: {"approximate": "tanh"},
        "ema_update_": lambda: {
            "momentum": torch.empty((), dtype=torch.float64, device="meta"),
            "shadow": None,
        },
        "adamw_ema_": lambda: {"targets": None, "targets_bf16": None, "params_bf16": None},
    }
    return [inputs, inputs | changes[op]()] if op in changes else [inputs]


def cases(op: str, size: str = "") -> list[OpCase]:
    """The benchmark cases of ``op`` whose size contains ``size``, those for any device."""
    return [case for case in all_cases(op, small=False) if size in case.size]


def launches(case: OpCase, dtype: torch.dtype, arch: int) -> list[Launch]:
    """What the op, forward and backward, launches."""
    from .._runtime.launch import record_launches

    op, meta = case.op, torch.device("meta")
    function = partial(case.function, impl="triton")
    # While this lasts, tensors without data count as such that Triton's kernels can take.
    allowed = mock.patch.dict(dispatch._found, {(op, "triton", "meta"): "yes"})
    with record_launches(arch) as recorded, allowed, meta:
        inputs = case.make_inputs(meta, dtype, 0)
        for given in _variants(op, inputs):
            with _RunLaunchers():
                evaluate(case, function, given)
        if op == "jepa_loss":  # a mode sees operators, so that the backward above made new tensors
            slope = inputs["pred"]
            backend(op, "triton", slope).backward(slope.sum(), [slope], [slope], 1.0)
    return recorded


_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def _specialization(launch: Launch) -> tuple[Any, ...]:
    """Signature, constants, attributes and options of the kernel that a launch needs."""
    import triton

    kernel = launch.kernel
    options = {name: launch.meta[name] for name in _OPTIONS if name in launch.meta}
    values = dict(zip(kernel.arg_names, launch.args, strict=False))
    values |= {name: value for name, value in launch.meta.items() if name not in options}
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        free = parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not free)
        ):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = (
                "*"
                + triton.runtime.jit.type_canonicalisation_dict[
                    str(value.dtype).removeprefix("torch.")
                ]
            )
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif isinstance(value, tuple):  # of addresses
            signature[parameter.name] = ("i64",) * len(value)
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def compile_launch(launch: Launch, arch: int) -> Any:
    """The compiled kernel of a recorded launch: the same types, constants and alignment."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    *special, options = _specialization(launch)
    source = ASTSource(launch.kernel, *special)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _constants(launch: Launch) -> str:
    return " ".join(
        f"{name}={int(value) if isinstance(value, bool) else value}"
        for name, value in launch.meta.items()
        if name not in _OPTIONS
    )


def _cuobjdump(file: Path) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return str(done.stdout)


def _numbers(line: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}


def _usage(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return _numbers(_cuobjdump(Path(file.name)))


def _demangled(name: str) -> str:
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_char_p
    result = runtime.__cxa_demangle(name.encode(), None, None, None)
    return str(result.decode()) if result else name


def measure_native(library: Path) -> list[Resources]:
    """The resources of each CUDA kernel in the native library, for each architecture in it."""
    rows, arch, name = [], 0, ""
    for line in _cuobjdump(library).splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.search(r"Function (\w+):", line):
            name = _demangled(found[1])
        elif "REG:" in line:
            usage = _numbers(line)
            kernel = re.search(r"(\w+)_kernel(?:<(.*?)>)?\(", name)
            row = Resources(
                kernel=kernel[1] if kernel else name,
                size="native",
                dtype="",
                arch=arch,
                constants=(kernel[2] or "") if kernel else "",
                registers=usage["REG"],
                shared=usage["SHARED"],
                local=usage["STACK"] + usage["LOCAL"],
                warps=0,
            )
            rows.append(row)
    return rows


def measure(op: str, size: str, dtype: torch.dtype, arch: int) -> Iterator[Resources]:
    """The resources of each distinct kernel that ``cases(op, size)`` launch, under the first."""
    seen: set[str] = set()
    found = [(case, launch) for case in cases(op, size) for launch in launches(case, dtype, arch)]
    for case, launch in found:
        name = launch.kernel.__name__ + repr(_specialization(launch))
        if name in seen:
            continue
        seen.add(name)
        compiled = compile_launch(launch, arch)
        usage = _usage(compiled)
        yield Resources(
            kernel=launch.kernel.__name__.strip("_").removesuffix("_kernel"),
            size=case.size,
            dtype=str(dtype).removeprefix("torch."),
            arch=arch,
            constants=_constants(launch),
            registers=usage["REG"],
            shared=int(compiled.metadata.shared),
            local=usage["STACK"] + usage["LOCAL"],
            warps=compiled.metadata.num_warps,
        )


def table(rows: list[Resources]) -> str:
    """One line per kernel; the numbers that matter first."""
    lines = [
        f"{'kernel':32} {'size':22} {'dtype':9} {'sm':>4} {'reg':>4} {'shared':>7} {'local':>5}"
    ]
    for row in rows:
        lines.append(
            f"{row.kernel:32} {row.size:22} {row.dtype:9} {row.arch:4} {row.registers:4} "
            f"{row.shared:7} {row.local:5}  "
            + (f"warps={row.warps} " if row.warps else "")
            + row.constants
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a kernel spills or needs more shared memory than there is."""
    parser = argparse.ArgumentParser(
        prog="python -m njepa_kernels.tools.resources", description=__doc__
    )
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--arch", nargs="*", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--size", default="", help="only cases whose size contains this")
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"])
    given = parser.parse_args(arguments)
    rows = [
        row
        for op in given.op
        for dtype in given.dtype
        for arch in given.arch
        for row in measure(op, given.size, getattr(torch, dtype), arch)
    ]
    library = LIBRARIES["cuda"][0]
    if library.exists():
        native = [row for row in measure_native(library) if row.arch in given.arch]
        names = tuple(op.rstrip("_") for op in given.op)
        rows += [row for row in native if row.kernel.startswith(names)]
    sys.stdout.write(table(rows) + "\n")
    bad = [row for row in rows if row.local or row.shared > SHARED_LIMIT[row.arch]]
    sys.stdout.write(f"{len(rows)} kernels, {len(bad)} with spills or too much shared memory\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
