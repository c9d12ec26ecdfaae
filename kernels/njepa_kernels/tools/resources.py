"""Registers, shared memory and spills of every GPU kernel, compiled ahead of time.

    python -m njepa_kernels.tools.resources [--arch 80 90] [--size vits16 vitl16] [--dtype bfloat16]

No GPU is needed: the launchers run on tensors without data, what they would launch is compiled by
Triton for the architecture asked for, and its ``cuobjdump`` reads the result. So it does with the
CUDA kernels of the native library, where that is built; they are the same for every size.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._runtime.native import LIBRARIES

if TYPE_CHECKING:
    from .._runtime.launch import Launch

ARCHITECTURES = (80, 90, 100)
#: Encoder width, depth, patches and batch of the sizes that are trained; predictor width 384.
SIZES = {
    "vits16": (384, 196, 256),
    "vitb16": (768, 196, 256),
    "vitl16": (1024, 196, 128),
    "vith14": (1280, 256, 128),
}
#: Bytes of shared memory one program may use (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_PREDICTOR_WIDTH = 384
_BLOCKS, _CONTEXT, _TARGETS = 4, 60, 40


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


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _patchify(width: int, n: int, batch: int, dtype: torch.dtype) -> None:
    from ..ops.patchify import triton_kernel as op

    columns = math.isqrt(n)
    side = 224 // columns
    images = _meta(batch, columns * side, columns * side, 3, dtype=torch.uint8)
    planes = images.new_empty(batch, 3, *images.shape[1:3]).permute(0, 2, 3, 1)
    for idx in (None, _meta(batch, _CONTEXT, dtype=torch.int64)):
        for pixels in (images, planes):
            op.forward(pixels, side, (1.0,) * 3, (0.0,) * 3, idx, dtype)


def _gather_tokens(width: int, n: int, batch: int, dtype: torch.dtype) -> None:
    from ..ops.gather_tokens import triton_kernel as op

    idx = _meta(batch, _CONTEXT, dtype=torch.int64)
    for pos in (None, _meta(n, width)):
        op.forward(_meta(batch, n, width, dtype=dtype), idx, pos)
        op.backward(_meta(batch, _CONTEXT, width, dtype=dtype), idx, n, pos is not None)


def _predictor_tokens(width: int, n: int, batch: int, dtype: torch.dtype) -> None:
    from ..ops.predictor_tokens import triton_kernel as op

    width = _PREDICTOR_WIDTH
    context_idx = _meta(batch, _CONTEXT, dtype=torch.int64)
    target_idx = _meta(batch, _BLOCKS, _TARGETS, dtype=torch.int64)
    ids = _meta(batch, dtype=torch.int64)
    context = _meta(batch, _CONTEXT, width, dtype=dtype)
    grad = _meta(_BLOCKS * batch, _CONTEXT + _TARGETS, width, dtype=dtype)
    for noisy, shared in ((False, False), (True, False), (True, True)):
        sigma = _meta(batch, _BLOCKS) if noisy else None
        tables = (_meta(n, width), _meta(width), context_idx, target_idx)
        op.forward(context, *tables, sigma, 7, 1, ids, shared)
        op.backward(grad, context_idx, target_idx, ids, 7, 1, shared, n, True, noisy)


def _jepa_loss(width: int, n: int, batch: int, dtype: torch.dtype) -> None:
    from ..ops.jepa_loss import triton_kernel as op

    pred = _meta(_BLOCKS * batch, _TARGETS, width, dtype=dtype)
    target_idx = _meta(batch, _BLOCKS, _TARGETS, dtype=torch.int64)
    h = _meta(batch, n, width, dtype=dtype)
    numbers = 0.1, 0.1, 1.0, 1e-5, 1e-6, 1e-6, 1e-6
    op.forward(pred, h, target_idx, None, *numbers, True, False)
    op.forward(pred, h, target_idx, pred, *numbers, True, True)
    for out in (pred, torch.empty_like(pred)):
        op.backward(_meta(), [pred, pred], [out, out], 1.0)


def _vicreg(width: int, n: int, batch: int, dtype: torch.dtype) -> None:
    from ..ops.vicreg import triton_kernel as op

    # Both sides, and the widest projector of the published recipes.
    for samples, channels in ((batch, width), (2048, width), (2048, 8192)):
        u = _meta(_BLOCKS, samples, channels, dtype=dtype)
        stats = _meta(_BLOCKS, channels)
        op.forward(u, 1.0, 1e-4)
        op.backward(u, stats, stats, _meta(), _meta(), _meta(), 1.0, 1e-4)


def _ema_update(width: int, n: int, batch: int, dtype: torch.dtype) -> None:
    from ..ops.ema_update_ import triton_kernel as op

    targets = [_meta(width, width), _meta(width)]
    sources = [_meta(*t.shape, dtype=dtype) for t in targets]
    shadow = [_meta(*t.shape, dtype=torch.bfloat16) for t in targets]
    op.update(targets, sources, 0.996, shadow)
    op.update(targets, sources, _meta(dtype=torch.float64), None)


_OPS: dict[str, Callable[[int, int, int, torch.dtype], None]] = {
    "patchify": _patchify,
    "gather_tokens": _gather_tokens,
    "predictor_tokens": _predictor_tokens,
    "jepa_loss": _jepa_loss,
    "vicreg": _vicreg,
    "ema_update_": _ema_update,
}

#: The op of each kernel of the native library.
_OP_OF = {
    "predictor_forward": "predictor_tokens",
    "context_gradient": "predictor_tokens",
    "target_gradient": "predictor_tokens",
    "count_rows": "predictor_tokens",
    "sort_rows": "predictor_tokens",
    "pos_gradient": "predictor_tokens",
    "column_sums": "predictor_tokens",
    "jepa_loss": "jepa_loss",
    "loss_terms": "jepa_loss",
    "scale": "jepa_loss",
    "ema": "ema_update_",
}


def launches(op: str, size: str, dtype: torch.dtype, arch: int) -> list[Launch]:
    """What ``op``, forward and backward, launches at the size of an encoder."""
    from .._runtime.launch import record_launches

    with record_launches(arch) as recorded:
        _OPS[op](*SIZES[size], dtype)
    return recorded


_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def compile_launch(launch: Launch, arch: int) -> Any:
    """The compiled kernel of a recorded launch: the same types, constants and alignment."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
    source = ASTSource(kernel, signature, constants, attributes)
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
    """The resources of each distinct kernel that ``op`` launches at this size."""
    seen: set[str] = set()
    for launch in launches(op, size, dtype, arch):
        compiled = compile_launch(launch, arch)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        usage = _usage(compiled)
        yield Resources(
            kernel=launch.kernel.__name__.strip("_").removesuffix("_kernel"),
            size=size,
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
        f"{'kernel':32} {'size':7} {'dtype':9} {'sm':>4} {'reg':>4} {'shared':>7} {'local':>5}"
    ]
    for row in rows:
        lines.append(
            f"{row.kernel:32} {row.size:7} {row.dtype:9} {row.arch:4} {row.registers:4} "
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
    parser.add_argument("--op", nargs="*", choices=list(_OPS), default=list(_OPS))
    parser.add_argument("--arch", nargs="*", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--size", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"])
    given = parser.parse_args(arguments)
    rows = [
        row
        for op in given.op
        for size in given.size
        for dtype in given.dtype
        for arch in given.arch
        for row in measure(op, size, getattr(torch, dtype), arch)
    ]
    library = LIBRARIES["cuda"][0]
    if library.exists():
        native = [row for row in measure_native(library) if row.arch in given.arch]
        rows += [row for row in native if _OP_OF.get(row.kernel) in given.op]
    sys.stdout.write(table(rows) + "\n")
    bad = [row for row in rows if row.local or row.shared > SHARED_LIMIT[row.arch]]
    sys.stdout.write(f"{len(rows)} kernels, {len(bad)} with spills or too much shared memory\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
