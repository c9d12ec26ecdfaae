"""Block sizes of the Triton kernels by measurement, on request only.

    python -m njepa_kernels.tools.tune OUT.json [--op ...] [--size vitl16] [--dtype bfloat16]

times the ops, forward and backward, on the GPU at hand with other block sizes around those of
``blocks.py``, and writes the ones that are faster. ``load_tiles(OUT.json)`` makes the ops use them.
Nothing is tuned or loaded unasked: another tile sums in another order, so that the last bits of
gradients and losses would depend on the machine's mood.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._runtime import blocks
from .._runtime.blocks import MAX_WIDTH, ProductTile, Tile
from .._runtime.dispatch import OPS
from ..testing import OpCase, all_cases, assert_within_baseline, cast_inputs, evaluate

AnyTile = Tile | ProductTile
Timer = Callable[[Callable[[], object]], float]

_LARGEST = {"rows": 1024, "block_d": MAX_WIDTH, "block": 128, "block_k": 128, "num_warps": 16}


def load_tiles(path: str | Path | None) -> None:
    """Use the block sizes of a file that this module wrote; None: those of ``blocks.py`` again.

    Raises:
        ValueError: no such file, or a tile in it that no kernel can have.
    """
    tiles: dict[str, AnyTile] = {}
    if path is not None:
        try:
            content = json.loads(Path(path).read_text())
            entries = content["tiles"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected a file of njepa_kernels.tools.tune, got {error!r}"
            ) from None
        tiles = {name: _parse(f"{path}: {name}", fields) for name, fields in entries}
    blocks.tuned_tiles.clear()
    blocks.tuned_tiles.update(tiles)


def _parse(where: str, fields: Any) -> AnyTile:
    for kind in (Tile, ProductTile):
        names = {field.name for field in dataclasses.fields(kind)}
        if isinstance(fields, dict) and fields.keys() == names:
            break
    else:
        raise ValueError(f"{where}: expected the fields of a tile, got {fields!r}")
    for name, value in fields.items():
        if name == "num_stages":
            fits = value in (1, 2, 3, 4, 5)
        elif name == "max_registers":
            fits = value is None or (type(value) is int and 32 <= value <= 255)
        else:
            fits = type(value) is int and 1 <= value <= _LARGEST[name] and value & (value - 1) == 0
        if not fits:
            raise ValueError(f"{where}: {name}={value!r} is no block size a kernel can have")
    return kind(**fields)


def save_tiles(path: str | Path, tiles: dict[str, AnyTile], device: str) -> None:
    """Write what ``load_tiles`` reads, with where it was measured."""
    content = {
        "device": device,
        "torch": torch.__version__,
        "tiles": {name: dataclasses.asdict(tile) for name, tile in tiles.items()},
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def neighbours(tile: AnyTile, width: int) -> Iterator[AnyTile]:
    """Tiles one step away: one size halved or doubled.

    A row that is held as a whole keeps its ``block_d``.
    """
    for field in dataclasses.fields(tile):
        value = getattr(tile, field.name)
        if field.name == "max_registers" or (field.name == "block_d" and value >= width):
            continue
        if field.name == "num_stages":
            steps, least, most = (value - 1, value + 1), 1, 5
        else:
            least = 16 if field.name.startswith("block") else 1
            steps, most = (value // 2, value * 2), _LARGEST[field.name]
        for step in steps:
            if least <= step <= most:
                yield dataclasses.replace(tile, **{field.name: step})


@contextmanager
def _asked() -> Iterator[dict[str, AnyTile]]:
    blocks.asked_tiles = {}
    try:
        yield blocks.asked_tiles
    finally:
        blocks.asked_tiles = None


def search(run: Callable[[], object], timer: Timer, gain: float = 0.02) -> dict[str, AnyTile]:
    """Faster tiles for the kernels that ``run`` launches, by steps from tile to neighbour.

    Args:
        run: launches the kernels. timer: seconds of a call of its argument.
        gain: the part of the whole time that a step must save to be taken.

    Returns:
        The tiles that differ from the defaults. They are in use when this returns.
    """
    from triton import TritonError

    with _asked() as asked:
        run()
    best, chosen = timer(run), blocks.tuned_tiles
    for place, default in asked.items():
        current, seen = chosen.get(place, default), set()
        width = int(place.split()[1])
        moved = True
        while moved:
            moved = False
            for candidate in neighbours(current, width):
                if candidate in seen:
                    continue
                seen.add(candidate)
                chosen[place] = candidate
                try:
                    seconds = timer(run)
                except TritonError:  # more registers or shared memory than there are
                    continue
                if seconds < best * (1 - gain):
                    best, current, moved = seconds, candidate, True
                    break
            chosen[place] = current
        if current == default:
            del chosen[place]
    return {place: chosen[place] for place in asked if place in chosen}


def tune_case(case: OpCase, dtype: torch.dtype, device: torch.device, timer: Timer) -> int:
    """Tune one case and check its values with the tiles found; how many tiles changed.

    Raises:
        AssertionError: wrong values.
    """
    inputs = case.make_inputs(device, dtype, 0)

    def fast(**arguments: Any) -> Any:
        return case.function(**arguments, impl="triton")

    found = search(lambda: evaluate(case, fast, inputs), timer)
    if found:
        exact = evaluate(case, case.reference, cast_inputs(inputs, torch.float64))
        eager = evaluate(case, case.eager, inputs)
        for name, value in evaluate(case, fast, inputs).items():
            what = f"{case.name} {name}"
            assert_within_baseline(value, eager[name], exact[name], dtype, what)
    return len(found)


def _time_on_gpu(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    run()  # compiles
    return float(do_bench(run, warmup=10, rep=50, return_mode="median")) / 1e3


def main(arguments: list[str] | None = None) -> int:
    """Tune the benchmark cases on the GPU; print each place with its tile before and after."""
    parser = argparse.ArgumentParser(prog="python -m njepa_kernels.tools.tune", description=__doc__)
    parser.add_argument("out", help="file to write")
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--size", default="", help="only cases whose size contains this")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    given = parser.parse_args(arguments)
    large = [c for op in given.op for c in all_cases(op, small=False) if "cuda" in c.devices]
    cases = [c for c in large if given.size in c.size]
    if not cases:
        known = sorted({c.size for c in large})
        parser.error(f"--size {given.size!r} is in no case; the cases are {', '.join(known)}")
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA device, and torch sees none")
    device = torch.device("cuda")
    for case in cases:
        changed = tune_case(case, getattr(torch, given.dtype), device, _time_on_gpu)
        sys.stdout.write(f"{case.name}: {changed} tiles changed\n")
        # After every case: what is found so far is kept if the rest is cut short.
        save_tiles(given.out, blocks.tuned_tiles, torch.cuda.get_device_name())
    for place, tile in blocks.tuned_tiles.items():
        sys.stdout.write(f"{place}: {tile}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
