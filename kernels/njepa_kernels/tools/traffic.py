"""Bytes that compiled Triton kernels ask the memory for, ahead of time: no GPU is needed.

    python -m njepa_kernels.tools.traffic [--size vitl16] [--arch 90]

The instructions are in the PTX, so bytes = width x threads x programs, times the trips of loops
(``trips.py``). What is counted are the wide accesses (16 bytes a thread) and single bytes (the
pixels of ``patchify``): those of the data. Narrow ones read an index or an address, or write the
sum of a program; all threads of a program do the former at the same place. A row that several
programs ask for counts each time; the cache may serve it. Not counted: the gradient of a table,
whose trips only the indices know.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from typing import TYPE_CHECKING, NamedTuple

import torch

from .resources import cases, compile_launch, launches
from .trips import DATA_WIDTH, runs

if TYPE_CHECKING:
    from .._runtime.launch import Launch

_OPS = (
    *("patchify", "gather_tokens", "predictor_tokens", "jepa_loss", "vicreg"),
    *("add_layer_norm", "bias_gelu", "ema_update_", "adamw_ema_"),
)
_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\s*[{\[]")
_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\b.*?\], (0x\w+)")


class Accesses(NamedTuple):
    """Bytes of data that a thread loads and stores in one piece of straight code."""

    loaded: int
    stored: int


def _access(line: str) -> tuple[bool, int] | None:
    """Whether it stores, and bytes of a thread; None: no access to the memory."""
    if (found := _ACCESS.search(line)) is not None:
        return found[1] == "st", int(found[2] or 1) * int(found[3]) // 8
    found = _ASYNC.search(line)
    return None if found is None else (False, int(found[1], 16))


def straight(ptx: str, widths: tuple[int, ...] = (1, 16)) -> list[Accesses]:
    """The pieces of a kernel between its labels and branches that access memory.

    Args:
        widths: bytes of an access that counts; others leave a piece with zeros.
    """
    found, moved, any_access = list[Accesses](), [0, 0], False
    for line in [*ptx.splitlines(), "bra"]:
        access = _access(line)
        if access is not None:
            any_access = True
            moved[access[0]] += access[1] if access[1] in widths else 0
        elif re.match(r"\s*(\$L__BB|(@!?%p\d+\s+)?bra\b)", line):
            if any_access:
                found.append(Accesses(*moved))
            moved, any_access = [0, 0], False
    return found


def loops_with_data(ptx: str) -> bool:
    """Whether a branch leads back over an access that moves data."""
    moved, at_label = 0, dict[str, int]()
    for line in ptx.splitlines():
        access = _access(line)
        moved += access is not None and access[1] in (1, 16)
        if label := re.match(r"\s*(\$L__BB\w+):", line):
            at_label[label[1]] = moved
        branch = re.search(r"\bbra\S*\s+(\$L__BB\w+)", line)
        if branch is not None and moved > at_label.get(branch[1], moved):
            return True
    return False


def pieces(ptx: str) -> list[Accesses]:
    """Those of ``straight`` that move data."""
    return [piece for piece in straight(ptx) if any(piece)]


def launch_bytes(launch: Launch, arch: int) -> Accesses:
    """What all threads of all programs of a launch load and store, with no lane masked off.

    Raises:
        ValueError: the code has other pieces than are known, or moves data in a loop that is not.
    """
    name, times = launch.kernel.__name__, runs(launch)
    ptx = compile_launch(launch, arch).asm["ptx"]
    if times is None:
        if loops_with_data(ptx):
            raise ValueError(f"{name} moves data in a loop whose trips are not known")
        found = pieces(ptx)
        if name == "_jepa_loss_fwd_kernel":  # a branch without accesses lies between
            found = [Accesses(*(sum(side) for side in zip(*found, strict=True)))]
        times = [math.prod(launch.grid)]
    else:
        found = straight(ptx, (DATA_WIDTH[name],) if name in DATA_WIDTH else (1, 16))
    if len(found) != len(times):
        raise ValueError(
            f"{name}: {len(found)} pieces of code access memory, {len(times)} are known (trips.py)"
        )
    threads = 32 * launch.meta["num_warps"]
    sides = zip(*found, strict=True)
    return Accesses(
        *(threads * sum(n * b for n, b in zip(times, side, strict=True)) for side in sides)
    )


def main(arguments: list[str] | None = None) -> int:
    """Print bytes of the instructions beside those of the formulas, which are of a whole op."""
    parser = argparse.ArgumentParser(
        prog="python -m njepa_kernels.tools.traffic", description=__doc__
    )
    parser.add_argument("--size", default="vitl16", help="only cases whose size contains this")
    parser.add_argument("--arch", type=int, default=90)
    given = parser.parse_args(arguments)
    sys.stdout.write(f"{'kernel':28} {'size':20} {'loaded, MB':>10} {'stored, MB':>10} formula\n")
    for op in _OPS:
        for case in cases(op, given.size):
            once, both = (case.bytes(torch.bfloat16, mode) / 1e6 for mode in ("fwd", "fwdbwd"))
            for launch in launches(case, torch.bfloat16, given.arch):
                try:
                    loaded, stored = launch_bytes(launch, given.arch)
                except ValueError:
                    continue
                name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
                back = "bwd" in name or name == "column_sums"
                formula = both if op == "jepa_loss" else both - once if back else once
                sys.stdout.write(
                    f"{name:28} {case.size:20} {loaded / 1e6:10.2f} {stored / 1e6:10.2f} "
                    f"{formula:.2f}\n"
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
