"""What ``model.target_dtype=fp8`` does to features and to a training, on a CPU.

    python -m bench.target_dtype [--steps 256] [--batch 64] [--methods ijepa cjepa]

First the error of the target's features against fp32, block by block: bf16, fp8 with a scale a row,
as the trainer has it, and fp8 with one scale for all rows. Then trainings of the recipe
``shapes-tiny`` under bf16 autocast, step by step beside each other from one seed: the target in
bf16, in fp8, and in bf16 with ``model.fused_block``, which changes nothing but roundings and so
shows what those alone do. ``own`` is the cosine of a run's features with those of its own fp32
target, ``other`` that of its fp32 target with the first run's; both after subtracting the mean.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch import Tensor

from njepa.config import load_config, parse_config
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.models.encoder import Encoder, build_encoder
from njepa.runs.ranks import Ranks, join_ranks, leave_ranks
from njepa.training import fp8_target
from njepa.training.ema import low_target, make_target
from njepa.training.loop import Loop
from njepa.training.setup import set_up

ARMS = {
    "bf16": ["model.target_dtype=bf16"],
    "fp8": ["model.target_dtype=fp8"],
    "bf16, fused blocks": ["model.target_dtype=bf16", "model.fused_block=true"],
}
DS = {
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
}  # fmt: skip


def one_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """``to_fp8`` with a scale for each matrix; the product's is still called by rows."""
    scale = x.abs().amax((-2, -1), keepdim=True).float() / 448
    scale = scale.expand(*x.shape[:-1], 1).contiguous()
    return (x / scale).to(fp8_target.FP8), scale


@torch.no_grad()
def outputs(encoder: Encoder, images: Tensor, low: bool) -> list[Tensor]:
    """Of the patch embedding with its positions, of each block and of the last norm, in fp32."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        first = encoder.blocks[0].register_forward_pre_hook(lambda _, x: found.append(x[0].float()))
        stack.callback(first.remove)
        for module in (*encoder.blocks, encoder.norm):
            hook = module.register_forward_hook(lambda *given: found.append(given[2].float()))
            stack.callback(hook.remove)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            encoder(images)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Mean over the tokens, after subtracting the mean of each side."""
    a, b = (x.flatten(0, -2) - x.flatten(0, -2).mean(0) for x in (a, b))
    return float(torch.nn.functional.cosine_similarity(a, b).mean())


def print_errors(title: str, target: Encoder, images: Tensor) -> None:
    """|difference from fp32| / |fp32| behind each block, and the cosine of the features."""
    want = outputs(target, images, low=False)
    ways = {"bf16": (False, fp8_target.to_fp8), "fp8, scale a row": (True, fp8_target.to_fp8)}
    ways["fp8, one scale"] = (True, one_scale)
    print(f"\n{title}\n| target | positions, blocks, norm: relative error | 1 - cosine |")
    print("|---|---|---|")
    for name, (fp8, scaled) in ways.items():
        with mock.patch.object(fp8_target, "to_fp8", scaled):
            got = outputs(low_target(target, fp8).encoder, images, low=True)
        errors = [float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
        print(f"| {name} | {', '.join(f'{e:.2g}' for e in errors)} |", end=" ")
        print(f"{1 - cosine(got[-1], want[-1]):.2g} |", flush=True)


@contextmanager
def running(
    method: str, batch: int, steps: int, folder: Path, ranks: Ranks
) -> Iterator[dict[str, Loop]]:
    """A training of each arm, before its first step."""
    loops: dict[str, Loop] = {}
    ds = parse_deepspeed({"train_micro_batch_size_per_gpu": batch, **DS})
    with ExitStack() as stack:
        for number, (name, overrides) in enumerate(ARMS.items()):
            given = [
                f"method={method}", f"run.dir={folder}/{method}-{number}", "run.device=cpu",
                f"run.max_steps={steps}", "data.workers=0", "run.tensorboard=false", *overrides,
            ]  # fmt: skip
            loops[name] = Loop(set_up(load_config("shapes-tiny", given), ds, ranks))
            stack.callback(loops[name].setup.close)
        yield loops


def train(
    method: str, batch: int, steps: int, folder: Path, ranks: Ranks
) -> tuple[Encoder, Tensor]:
    """Print the runs beside each other; returns the first's fp32 target and last images."""
    print(f"\n{method}, {steps} steps of {batch} images\n| steps | run | loss | own | other |")
    print("|---|---|---|---|---|")
    with running(method, batch, steps, folder, ranks) as loops:
        states = {name: loop.setup.state for name, loop in loops.items()}
        losses: dict[str, list[float]] = {name: [] for name in loops}
        last: list[Tensor] = []  # the images of the step, which all runs share
        states["bf16"].running.register_forward_pre_hook(lambda _, given: last.append(given[0]))
        for step in range(1, steps + 1):
            for name, loop in loops.items():
                seen = loop.advance().micro_batches
                losses[name].append(float(seen[0].metrics["loss"]))
            if step % max(1, steps // 8) and step != steps:
                continue
            images = last[-1]
            last.clear()
            first = outputs(states["bf16"].target, images, low=False)[-1]
            for name, state in states.items():
                whole = outputs(state.target, images, low=False)[-1]
                own = cosine(outputs(state.running, images, low=True)[-1], whole)
                mean = statistics.fmean(losses[name])
                losses[name].clear()
                other = cosine(whole, first)
                print(f"| {step} | {name} | {mean:.4f} | {own:.5f} | {other:.4f} |", flush=True)
        for name, loop in loops.items():
            print(f"{name}:", loop.setup.scoring.knn(loop.setup.scoring.encoders()), flush=True)
        return make_target(states["bf16"].target), images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--methods", nargs="*", default=["ijepa", "cjepa"])
    args = parser.parse_args()
    ranks = join_ranks("cpu")
    vit = parse_config({"model": {"encoder": "vit_small"}})
    images = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8)
    print_errors(
        "ViT-S/16, random weights, 4 random images", make_target(build_encoder(vit)), images
    )
    with TemporaryDirectory() as folder:
        for method in args.methods:
            trained = train(method, args.batch, args.steps, Path(folder), ranks)
            title = f"the bf16 run of {method} after {args.steps} steps, its last batch"
            print_errors(title, *trained)
    leave_ranks()


if __name__ == "__main__":
    main()
