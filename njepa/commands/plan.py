"""``njepa plan``: the tables of ``njepa.planning`` for one configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from njepa import planning as plan
from njepa.commands.parsers import command_parser
from njepa.commands.tables import columns
from njepa.config import Config, ConfigError, load_config
from njepa.config.deepspeed_file import BatchSizes, DeepSpeedFile, load_deepspeed_file

DESCRIPTION = """What a step of a configuration costs, and on how many GPUs it fits:
computed, not measured. Needs no GPU and no data."""
EPILOG = """Ceilings that are not given are the vendor's. For example:

  njepa plan --recipe in1k-vith14 --ds_config njepa/recipes/in1k.zero1.json --gpus 64 --gpu h200
  njepa plan --recipe in1k-vitl16 --step --micro 128 --gpu h100 --json step.json
"""


SCALES = [2**i for i in range(11)]


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Print the plan; returns the exit status."""
    args = parser(prog).parse_intermixed_args(argv)
    print(_plan(args))
    return 0


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(prog, DESCRIPTION, EPILOG)
    add = result.add_argument
    add("--recipe", metavar="R", help="recipe, or a .yaml file (default: shapes-tiny)")
    file = "DeepSpeed file (default: %(default)s)"
    add("--ds_config", default="ds.json", metavar="FILE", help=file)
    add("--gpus", default="8,16,64", metavar="N,N", help="numbers of GPUs (default: %(default)s)")
    kind = "a100, h100, h200 or b200 (default: %(default)s)"
    add("--gpu", default="h200", metavar="NAME", help=kind)
    add("--memory", type=float, metavar="GB", help="of one GPU, 10^9 bytes")
    free = "share of it kept free (default: %(default)s)"
    add("--reserve", type=float, default=0.1, metavar="X", help=free)
    add("--tflops", type=float, metavar="N", help="dense bf16 ceiling of one GPU, TFLOP/s")
    share = "share of the ceiling that matrix products reach (default: %(default)s)"
    add("--efficiency", type=float, default=0.5, metavar="X", help=share)
    add("--gbps", type=float, metavar="N", help="bandwidth of a GPU's memory, GB/s")
    add("--nvlink", type=float, metavar="GB/S", help="sent by a GPU within its node")
    add("--internode", type=float, metavar="GB/S", help="sent by a node of 8 GPUs")
    step = "where the time of one step is predicted to go, kernel by kernel, on one GPU"
    add("--step", action="store_true", help=step)
    add(
        "--micro", type=int, metavar="IMAGES", help="with --step: of the step (default: the file's)"
    )
    add("--json", metavar="FILE", help="with --step: write every kernel kind there")
    add("overrides", nargs="*", metavar="section.key=value", help="settings, as for njepa train")
    return result


def _plan(args: argparse.Namespace) -> str:
    worlds = _worlds(args.gpus)
    if args.gpu not in plan.GPUS:
        raise ConfigError(f"--gpu {args.gpu} is unknown; known: {', '.join(plan.GPUS)}")
    for name, given in (("micro", args.micro), ("json", args.json)):
        if given is not None and not args.step:
            raise ConfigError(f"--{name} belongs to --step, which is not given; add --step")
    for name in ("memory", "tflops", "gbps", "nvlink", "internode"):
        value = getattr(args, name)
        if value is not None and not 1e-3 <= value <= 1e9:
            raise ConfigError(f"--{name} must be from 0.001 to 1e9, got {value:g}")
    if not 0 <= args.reserve < 1:
        raise ConfigError(f"--reserve must be in [0, 1), got {args.reserve:g}; 0.1 keeps a tenth")
    if not 1e-3 <= args.efficiency <= 1:
        raise ConfigError(f"--efficiency must be from 0.001 to 1, got {args.efficiency:g}")
    config = load_config(args.recipe, ["data.path=.", *args.overrides])
    ds = load_deepspeed_file(args.ds_config)
    gpu = plan.with_ceilings(
        plan.GPUS[args.gpu],
        memory=_times(args.memory, 1e9),
        flops=_times(args.tflops, 1e12),
        bandwidth=_times(args.gbps, 1e9),
        nvlink=_times(args.nvlink, 1e9),
        internode=_times(args.internode, 1e9),
    )
    if args.step:
        from njepa.commands.plan_step import step_report

        return step_report(config, ds, gpu, args)
    nominal = [
        name for name in ("memory", "tflops", "gbps", "nvlink", "internode")
        if getattr(args, name) is None
    ]  # fmt: skip
    zero = plan.zero_settings(ds)
    parts = [_model(config, ds, worlds), _memory(config, zero, worlds, gpu, args.reserve)]
    parts += [_scaling(config, ds, zero, worlds, gpu, args)]
    parts += [_assumptions(gpu, args, nominal)]
    return "\n\n".join(parts)


def _model(config: Config, ds: DeepSpeedFile, worlds: Sequence[int]) -> str:
    net, sizes = plan.network(config), ds.resolve(worlds[0])
    shapes = plan.drawn_shapes(config, sizes)
    mean = [sum(s[i] * n for s, n in shapes.items()) / shapes.total() for i in (0, 1)]
    top = plan.largest(shapes)
    head = (
        f"{config.recipe}, {config.method}, {config.model.encoder}/{config.model.patch_size} at "
        f"{config.data.image_size} px: encoder {net.encoder.depth} x {net.encoder.width}, "
        f"{net.encoder_parameters / 1e6:.2f} M parameters; trained in all "
        f"{net.trained_parameters / 1e6:.2f} M\n"
        f"tokens: {net.patches} patches, context {mean[0]:.1f} (largest {top.context}), "
        f"{config.mask.n_targets} targets of {mean[1]:.1f} (largest {top.target}),\n"
        f"over {plan.STEPS} steps of {sizes.micro} images a GPU, {sizes.world} of them"
    )
    flops = plan.mean_flops(config, sizes)
    total = sum(f.total for f in flops.values())
    rows = [
        [name, *(f"{x / sizes.micro / 1e9:.2f}" for x in f), f"{100 * f.total / total:.1f}"]
        for name, f in flops.items()
    ]
    sums = [sum(f.forward for f in flops.values()), sum(f.backward for f in flops.values())]
    rows.append(["all", *(f"{x / sizes.micro / 1e9:.2f}" for x in sums), "100.0"])
    table = columns(["useful GFLOP per image", "forward", "backward", "%"], rows)
    return f"{head}\n\n{table}"


def _memory(
    config: Config, zero: plan.ZeroSettings, worlds: Sequence[int], gpu: plan.Gpu, reserve: float
) -> str:
    net, rows = plan.network(config), []
    capacity = gpu.memory * (1 - reserve)
    for world in worlds:
        for stage in (0, 1, 2, 3) if world > 1 else (0,):
            if stage == 0 and zero.precision is plan.BF16:
                continue  # refused by load_deepspeed_file
            at = plan.with_stage(zero, stage)
            state = plan.state_bytes(net, at, world)
            fit = [
                plan.largest_micro_batch(config, at, world, capacity, checkpointed)
                for checkpointed in (False, True)
            ]
            sent = sum(plan.traffic_bytes(net, at, world).values())
            rows.append(
                [str(world), str(stage)]
                + [f"{value / 1e9:.2f}" for value in state.values()]
                + [f"{sum(state.values()) / 1e9:.2f}", *(str(n) if n else "none" for n in fit)]
                + [f"{sent / 1e9:.2f}"]
            )
    head = ["GPUs", "ZeRO", "param.", "grad.", "master", "Adam", "target", "buckets", "gathered"]
    head += ["all", "batch", "ckpt.", "sent"]
    title = (
        f"GB per GPU, the largest micro-batch within {capacity / 1e9:.1f} GB without and with "
        f"checkpointed blocks\n(ckpt.), and GB sent per step and GPU:"
    )
    return f"{title}\n\n{columns(head, rows)}"


def _scaling(
    config: Config,
    ds: DeepSpeedFile,
    zero: plan.ZeroSettings,
    worlds: Sequence[int],
    gpu: plan.Gpu,
    args: argparse.Namespace,
) -> str:
    capacity, first = gpu.memory * (1 - args.reserve), ds.resolve(worlds[0])
    fitting = plan.largest_micro_batch(config, zero, first.world, capacity, checkpointed=False)
    micro = min(first.micro, fitting)
    if micro == 0:
        return f"not even one image fits into {capacity / 1e9:.1f} GB: no speed to predict"
    rows, base = [], 0.0
    for world in SCALES:
        alike = BatchSizes(micro, 1, world)
        time = plan.step_time(config, alike, zero, gpu, args.efficiency)
        rate = alike.total / time.serial
        base = base or rate
        cells = [str(world), *(f"{x * 1e3:.1f}" for x in (time.compute, time.update, time.traffic))]
        cells += [f"{rate:.0f} to {alike.total / time.overlapped:.0f}"]
        cells += [f"{100 * rate / base / world:.0f}"]
        given = _given_batch(ds, world)
        if given is None:
            cells += ["-", "-", "-"]
        else:
            shape = plan.largest(plan.drawn_shapes(config, given))
            peak = plan.peak_bytes(config, shape, given.micro, zero, world, checkpointed=False)
            time = plan.step_time(config, given, zero, gpu, args.efficiency)
            cells += [f"{given.micro} x {given.accumulation}", f"{peak / 1e9:.1f}"]
            cells += [f"{given.total / time.serial:.0f} to {given.total / time.overlapped:.0f}"]
        rows.append(cells)
    head = ["GPUs", "compute ms", "update ms", "traffic ms", "images/s", "% of linear"]
    head += ["file: batch", "GB", "images/s"]
    return (
        f"predicted for ZeRO {zero.stage}; left: micro-batch {micro} on every GPU; right: the "
        f"batch of the file (times\naccumulation) and the GB it needs. images/s without and with "
        f"traffic hidden under the backward;\ncontexts are shorter in larger global batches, so "
        f"some rows are above 100 %:\n\n{columns(head, rows)}"
    )


def _given_batch(ds: DeepSpeedFile, world: int) -> BatchSizes | None:
    """The batch of the file on so many ranks, None where it does not divide."""

    try:
        return ds.resolve(world)
    except ConfigError:
        return None


def _assumptions(gpu: plan.Gpu, args: argparse.Namespace, nominal: list[str]) -> str:
    said = f"nominal, not measured: {', '.join(nominal)}" if nominal else "all as given"
    return (
        f"Assumed: {args.gpu} with {gpu.memory / 1e9:g} GB ({100 * args.reserve:g} % kept free for "
        f"the CUDA context, libraries and fragmentation),\n{gpu.flops / 1e12:g} TFLOP/s of which "
        f"the products reach {100 * args.efficiency:g} %, {gpu.bandwidth / 1e9:g} GB/s memory, "
        f"{gpu.nvlink / 1e9:g} GB/s within\na node of 8, {gpu.internode / 1e9:g} GB/s between "
        f"nodes ({said}).\nNo latency of launches or messages, no stragglers, no waiting for data: "
        f"small micro-batches on many GPUs\nwill do worse. Computed, not measured."
    )


def _worlds(text: str) -> list[int]:
    try:
        worlds = [int(part) for part in text.split(",")]
    except ValueError:
        worlds = [0]
    if min(worlds) < 1:
        raise ConfigError(f"--gpus must be positive integers like 8,16,64, got {text!r}")
    return worlds


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
