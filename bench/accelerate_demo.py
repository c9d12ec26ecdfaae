"""A training step in the published style, before and after ``integrations.accelerate``.

    python -m bench.accelerate_demo [--size vits16-224-b8] [--pairs 15] [--device cpu] [--amp]

The script is ``bench/published/script.py``, loaded twice; one copy is accelerated. Both train
from the same weights on the same images and masks, step by step in turns, on one thread; their
losses must agree at every step, or no time is printed and the exit status is 1. On a CPU the time
is that of the process, which other work on the machine disturbs less than the wall clock. "targets
and loss" is LayerNorm, masks, repeats and smooth-L1 with its backward; "average" is the loop over
the parameters against ``nn.Ema``, which accelerate does not put in.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import njepa_kernels
import torch
from njepa_kernels import integrations

SCRIPT = Path(__file__).parent / "published" / "script.py"
#: patch, image side, width, encoder depth, heads, predictor depth, batch, context tokens, target
#: tokens. 33 is the published mean at 14 x 14 patches, 64 lies between those of batch 1 and 128.
SIZES = {
    "vits16-224-b8": (16, 224, 384, 12, 6, 6, 8, 64, 33),
    "tiny": (4, 16, 32, 1, 2, 1, 2, 7, 3),
}
AGREE = 1e-4  # relative, fp32; under bf16 autocast 1e-2


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def median_times(
    before: Callable[[], object], after: Callable[[], object], pairs: int, device: str
) -> tuple[float, float, list[float]]:
    """Median milliseconds of both and the quartiles of the ratios, called in turns."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs + 1):
        # The order changes from pair to pair; the first pair warms up.
        for which in (0, 1) if pair % 2 else (1, 0):
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            (before, after)[which]()
            if device == "cuda":
                torch.cuda.synchronize()
            if pair:
                times[which].append(1e3 * (clock() - start))
    ratios = [b / a for b, a in zip(*times, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return statistics.median(times[0]), statistics.median(times[1]), quartiles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="vits16-224-b8")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error(f"--pairs must be at least 2, got {args.pairs}")
    torch.set_num_threads(1)
    patch, side, width, depth, heads, predictor_depth, batch, k_context, k_target = SIZES[args.size]
    n = (side // patch) ** 2

    scripts = (load_script("before"), load_script("after"))
    losses: tuple[list[float], list[float]] = ([], [])
    steps, encoders = [], []
    for script, own in zip(scripts, losses, strict=True):
        torch.manual_seed(0)
        encoder = script.Encoder(side // patch, patch, width, depth, heads)
        predictor = script.Predictor(side // patch, width, width, predictor_depth, heads)
        encoder, predictor = encoder.to(args.device), predictor.to(args.device)
        if script is scripts[1]:
            for part in (encoder, predictor, script):
                print(integrations.accelerate(part))
        parameters = [*encoder.parameters(), *predictor.parameters()]
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4)
        train_step = script.make_step(encoder, predictor, None, optimizer, amp=args.amp)
        images = torch.randn(batch, 3, side, side).to(args.device)
        masks = [
            [mask.to(args.device) for mask in group]
            for group in script.draw_masks(batch, n, k_context, k_target)
        ]

        def step(train_step=train_step, images=images, masks=masks, own=own) -> None:
            own.append(float(train_step(images, *masks)))

        steps.append(step)
        encoders.append(encoder)
    rows = [("whole step", *median_times(*steps, args.pairs, args.device))]

    tolerance = 1e-2 if args.amp else AGREE
    worst = max(abs(a - b) / abs(b) for b, a in zip(*losses, strict=True))
    if not worst <= tolerance:
        print(f"losses differ by {worst:.1e} (relative), more than {tolerance}", file=sys.stderr)
        return 1

    h = torch.randn(batch, n, width, device=args.device)
    z = torch.randn(4 * batch, k_target, width, device=args.device, requires_grad=True)

    def targets_and_loss(script: ModuleType) -> None:
        with torch.no_grad():
            y = script.apply_masks(script.F.layer_norm(h, (width,)), masks[1])
            y = script.repeat_interleave_batch(y, batch, repeat=1)
        script.F.smooth_l1_loss(z, y).backward()

    parts = [lambda script=script: targets_and_loss(script) for script in scripts]
    rows.append(("targets and loss", *median_times(*parts, 5 * args.pairs, args.device)))

    target = copy.deepcopy(encoders[0])
    ema = njepa_kernels.nn.Ema(copy.deepcopy(target), encoders[0])

    def loop() -> None:
        with torch.no_grad():
            for q, p in zip(target.parameters(), encoders[0].parameters(), strict=True):
                q.data.mul_(0.996).add_((1.0 - 0.996) * p.detach().data)

    average = median_times(loop, lambda: ema.update_(0.996), 5 * args.pairs, args.device)
    rows.append(("average", *average))

    kind = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(
        f"\n{args.size}, {args.device} ({kind}), torch {torch.__version__}, 1 thread, "
        f"{'bf16 autocast' if args.amp else 'fp32'}, {k_context} context and 4 x {k_target} target "
        f"tokens, {args.pairs} pairs of steps\n"
    )
    print(
        "| part | before, ms | after, ms | before / after, median (quartiles) |\n|---|---|---|---|"
    )
    for name, before, after, (low, middle, high) in rows:
        print(f"| {name} | {before:.2f} | {after:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    print(f"\nlosses of {len(losses[0])} steps agree to {worst:.1e} (relative)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
