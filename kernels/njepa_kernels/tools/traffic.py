"""Bytes that compiled Triton kernels ask the memory for, ahead of time: no GPU is needed.

    python -m njepa_kernels.tools.traffic [--size vitl16] [--arch 90]

The instructions are in the PTX, so bytes = width x threads x programs, for straight code. What is
counted are the wide accesses (16 bytes a thread) and single bytes (the pixels of ``patchify``):
those of the data. Narrow ones read an index or an address, or write the sum of a program; all
threads of a program do the former at the same place. A row that several programs ask for counts
each time; the cache may serve it.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from typing import TYPE_CHECKING, NamedTuple

import torch

from .resources import cases, compile_launch, launches

if TYPE_CHECKING:
    from .._runtime.launch import Launch

#: The ops whose kernels are straight code; of others the trips of loops are not known here.
STRAIGHT = ("patchify", "ema_update_", "adamw_ema_", "jepa_loss")
_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\s*[{\[]")


class Accesses(NamedTuple):
    """Bytes of data that a thread loads and stores in one piece of straight code."""

    loaded: int
    stored: int


def pieces(ptx: str) -> list[Accesses]:
    """The straight pieces of a kernel between its labels and branches, those with data alone."""
    found, loaded, stored = list[Accesses](), 0, 0
    for line in [*ptx.splitlines(), "bra"]:
        access = _ACCESS.search(line)
        if access is not None:
            kind, count, bits = access[1], int(access[2] or 1), int(access[3])
            width = count * bits // 8
            if width == 16 or bits == 8:
                loaded, stored = (
                    (loaded + width, stored) if kind == "ld" else (loaded, stored + width)
                )
        elif re.match(r"\s*(\$L__BB|(@!?%p\d+\s+)?bra\b)", line):
            if loaded or stored:
                found.append(Accesses(loaded, stored))
            loaded = stored = 0
    return found


def launch_bytes(launch: Launch, arch: int) -> Accesses:
    """What all threads of all programs of a launch load and store, with no lane masked off.

    Raises:
        ValueError: the data is not moved in one straight piece.
    """
    found = pieces(compile_launch(launch, arch).asm["ptx"])
    if launch.kernel.__name__ == "_jepa_loss_fwd_kernel":  # a branch without accesses lies between
        found = [Accesses(*(sum(side) for side in zip(*found, strict=True)))]
    if len(found) != 1:
        raise ValueError(f"{launch.kernel.__name__}: {len(found)} pieces of code move data, not 1")
    threads = 32 * launch.meta["num_warps"] * math.prod(launch.grid)
    return Accesses(threads * found[0].loaded, threads * found[0].stored)


def main(arguments: list[str] | None = None) -> int:
    """Print bytes of the instructions beside those of the formulas."""
    parser = argparse.ArgumentParser(
        prog="python -m njepa_kernels.tools.traffic", description=__doc__
    )
    parser.add_argument("--size", default="vitl16", help="only cases whose size contains this")
    parser.add_argument("--arch", type=int, default=90)
    given = parser.parse_args(arguments)
    sys.stdout.write(f"{'kernel':28} {'size':20} {'loaded, MB':>10} {'stored, MB':>10} formula\n")
    for op in STRAIGHT:
        for case in cases(op, given.size):
            formula = case.bytes(torch.bfloat16, "fwdbwd" if op == "jepa_loss" else "fwd") / 1e6
            for launch in launches(case, torch.bfloat16, given.arch):
                try:
                    loaded, stored = launch_bytes(launch, given.arch)
                except ValueError:
                    continue
                name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
                sys.stdout.write(
                    f"{name:28} {case.size:20} {loaded / 1e6:10.2f} {stored / 1e6:10.2f} "
                    f"{formula:.2f}\n"
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
