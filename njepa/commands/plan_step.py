"""``njepa plan --step``: where the time of one step is predicted to go, kernel by kernel."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from njepa import planning as plan
from njepa.atomic import write_atomically
from njepa.commands.checks import check_writable
from njepa.commands.tables import columns
from njepa.config import Config, ConfigError
from njepa.config.deepspeed_file import BatchSizes, DeepSpeedFile
from njepa.planning import step_budget as budget
from njepa.planning.step_trace import Operator, trace_step

_HEAD = ["launches", "GFLOP", "GB must", "GB moved", "ms ideal", "ms", "%"]


def step_report(config: Config, ds: DeepSpeedFile, gpu: plan.Gpu, args: argparse.Namespace) -> str:
    """The tables; writes ``--json`` where asked for.

    Raises:
        ConfigError: a precision or a batch that cannot be traced, a file that cannot be written.
    """
    zero = plan.zero_settings(ds)
    if zero.precision is plan.BF16:
        raise ConfigError(
            "njepa plan --step counts fp32 weights, with or without autocast, got bf16; plan with "
            "torch_autocast in the DeepSpeed file"
        )
    micro = ds.resolve(1).micro if args.micro is None else args.micro
    low = zero.precision is plan.AUTOCAST
    if config.model.target_dtype == "fp8" and args.gpu == "a100":
        raise ConfigError(
            "model.target_dtype=fp8 needs a GPU of compute capability 8.9 or more, got --gpu a100; "
            "plan with --gpu h100, h200 or b200, or with model.target_dtype=auto"
        )
    smallest = 2 if config.vicreg.weight > 0 else 1
    if micro < smallest:
        raise ConfigError(f"--micro must be at least {smallest}, got {micro}")
    if args.json is not None:
        check_writable("--json", Path(args.json))
    net, shapes = plan.network(config), plan.drawn_shapes(config, BatchSizes(micro, 1, 1))
    shape = plan.Shape(*(round(sum(s[i] * n for s, n in shapes.items()) / shapes.total())
                         for i in (0, 1)))  # fmt: skip
    operators = trace_step(config, shape, micro, low)
    rates = budget.Rates.of(gpu, args.efficiency)
    phases = _sums(operators, budget.phase_of, budget.PHASES, rates, low)
    parts = _sums(operators, budget.part_of, budget.PARTS, rates, low)
    total = budget.NOTHING
    for one in phases.values():
        total = total.plus(one)
    share = total.flops / total.seconds / gpu.flops
    head = (
        f"{config.recipe}, {config.method}: {micro} images, {net.patches} patches, context "
        f"{shape.context}, {config.mask.n_targets} targets of {shape.target}; "
        f"{'bf16 autocast' if low else 'fp32'}, one {args.gpu}, eager blocks.\n"
        f"Predicted, not measured: {total.seconds * 1e3:.1f} ms, "
        f"{micro / total.seconds:.0f} images/s, {100 * share:.0f} % of {gpu.flops / 1e12:g} "
        f"TFLOP/s; with ideal fusion {total.ideal * 1e3:.1f} ms."
    )
    tail = (
        f"A kernel takes the longer of its FLOPs at {rates.flops / 1e12:g} TFLOP/s "
        f"(--tflops x --efficiency) and its bytes at\n{rates.bandwidth / 1e9:g} GB/s (--gbps). No "
        f"latency of launches, no wait for data or host. FLOPs are of matrix products,\nwith those "
        f"that attention computes again. must: with ideal fusion (docs/planning.md)."
    )
    if args.json is not None:
        _write(args.json, config, args, (shape, micro, low, rates), operators, total)
    tables = [_table("phase", phases, total), _table("part", parts, total, sum_line=False)]
    return "\n\n".join([head, *tables, tail])


def _sums(
    operators: Sequence[Operator], key: Callable[[Operator], str], order: Sequence[str],
    rates: budget.Rates, low: bool,
) -> dict[str, budget.Sum]:  # fmt: skip
    found = budget.sums(operators, key, rates, low)
    return {
        name: found[name]
        for first in order
        for name in (first, f"{first}, backward")
        if name in found
    }


def _table(
    title: str, rows: dict[str, budget.Sum], total: budget.Sum, sum_line: bool = True
) -> str:
    lines = [
        [name, *_cells(one), f"{100 * one.seconds / total.seconds:.1f}"]
        for name, one in (rows | ({"step": total} if sum_line else {})).items()
    ]
    return columns([title, *_HEAD], lines)


def _cells(one: budget.Sum) -> list[str]:
    return [
        str(one.launches), f"{one.flops / 1e9:.0f}", f"{one.must / 1e9:.2f}",
        f"{one.moved / 1e9:.2f}", f"{one.ideal * 1e3:.2f}", f"{one.seconds * 1e3:.2f}",
    ]  # fmt: skip


def _write(
    path: str, config: Config, args: argparse.Namespace,
    run: tuple[plan.Shape, int, bool, budget.Rates], operators: Sequence[Operator],
    total: budget.Sum,
) -> None:  # fmt: skip
    """Every phase x part x operator, with the assumptions."""
    shape, micro, low, rates = run
    keyed = budget.sums(
        operators,
        lambda o: "|".join((budget.phase_of(o), budget.part_of(o), o.name)),
        rates,
        low,
    )
    rows: list[dict[str, Any]] = [
        dict(zip(("phase", "part", "operator"), name.split("|"), strict=True)) | one._asdict()
        for name, one in keyed.items()
    ]
    content = {
        "predicted": "not measured",
        "recipe": config.recipe, "method": config.method, "images": micro,
        "context": shape.context, "target": shape.target, "autocast": low, "gpu": args.gpu,
        "flops_per_s": rates.flops, "bytes_per_s": rates.bandwidth,
        "step": total._asdict(), "rows": rows,
    }  # fmt: skip
    try:
        write_atomically(Path(path), json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error}") from None
