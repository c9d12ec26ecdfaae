"""What ``optim.fused_update`` and the target's bf16 weights are worth on this machine.

    python -m bench.update [--size vits16-224-b8] [--seconds 30] [--step-seconds 60] [--threads 1]

The update alone, on the parameters of the encoder: ``casts`` is torch's fused AdamW, the average
and a cast of the target's weights, as autocast made it in every step; in ``apart`` the average
writes the bf16 weights; ``one`` is ``adamw_ema_``. Then whole steps under bf16 autocast with random
masks, in the same three ways. All take turns; the medians, and their ratio to ``casts``. Results
are compared before anything is timed. Last, errors of the target's features against fp64, with the
residual stream in fp32, as it is, and in bf16, which is why it is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy

import torch
from njepa_kernels import adamw_ema_, ema_update_
from njepa_kernels.ops.adamw_ema_.cases import _case
from njepa_kernels.ops.ema_update_.cases import vit_shapes
from njepa_kernels.testing import VITS, copy_inputs

from bench.measure import interleaved
from bench.our_step import OurStep
from bench.step_sizes import parse_case, step_config
from njepa.config import Config
from njepa.data.batch import Batch, Masks
from njepa.models.encoder import build_encoder
from njepa.models.jepa import build_jepa
from njepa.training.ema import low_target, make_target

Calls = dict[str, Callable[[int], None]]
CPU = torch.device("cpu")


def updates(vit: str) -> Calls:
    """The update in its three ways, each on tensors of its own."""
    start = _case(vit, vit_shapes(VITS[vit])).make_inputs(CPU, torch.float32, 0)
    start |= {"params_bf16": None, "found_inf": torch.tensor(0.0)}
    calls: Calls = {}
    given = {name: copy_inputs(start) for name in ("casts", "apart", "one")}

    def apart(name: str, copies: bool) -> Callable[[int], None]:
        x = given[name]
        leaves = [torch.nn.Parameter(p) for p in x["params"]]
        optimizer = torch.optim.AdamW(
            leaves, x["lr"], x["betas"], x["eps"], x["weight_decay"], fused=True
        )
        for i, leaf in enumerate(leaves):
            state = {k: x[f"{k}s"][i] for k in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[leaf], leaf.grad = state, x["grads"][i]
        optimizer.found_inf = x["found_inf"]  # type: ignore[attr-defined]
        weights = [leaf.detach() for leaf in leaves]

        def call(_: int) -> None:
            optimizer.step()
            ema_update_(x["targets"], weights, x["momentum"], x["targets_bf16"] if copies else None)
            if not copies:
                for target in x["targets"]:
                    target.bfloat16()

        return call

    calls["casts"], calls["apart"] = apart("casts", False), apart("apart", True)
    calls["one"] = lambda _: adamw_ema_(**given["one"])
    for call in calls.values():
        call(0)
    for name in ("apart", "one"):
        for got, want in zip(given[name]["targets"], given["casts"]["targets"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    return calls


def random_batch(config: Config, batch: int, context: int, targets: int) -> Batch:
    side, n = config.data.image_size, config.grid[0] * config.grid[1]
    blocks = config.mask.n_targets

    def patches(*shape: int) -> torch.Tensor:
        drawn = torch.rand(*shape[:-1], n).argsort(-1)
        return drawn[..., : shape[-1]].sort(-1).values

    masks = Masks(patches(batch, context), patches(batch, blocks, targets))
    images = torch.randint(256, (batch, side, side, 3), dtype=torch.uint8)
    return Batch(images, masks, None, torch.arange(batch), 0)


def steps(name: str) -> Calls:
    """Whole steps in the three ways."""
    case = parse_case(name)
    torch.manual_seed(0)
    calls: Calls = {}
    losses: dict[str, list[float]] = {}
    for way in ("casts", "apart", "one"):
        config = step_config(case, ("optim.fused_update=true",) if way == "one" else ())
        step = OurStep(config, build_jepa(config).state_dict(), CPU, low=True)
        if way == "casts":
            step.state.low = step.state.target_forward = None
        vit = VITS[name.partition("-")[0]]
        torch.manual_seed(1)
        batch = random_batch(config, case.batch or 8, vit.context, vit.targets)
        calls[way] = lambda _, step=step, batch=batch: step(batch)  # type: ignore[misc]
        losses[way] = [float(step(batch)) for _ in range(3)]
    if not losses["casts"] == losses["apart"]:
        raise AssertionError(f"the target's bf16 weights change the losses: {losses}")
    torch.testing.assert_close(losses["one"], losses["casts"], rtol=1e-4, atol=0)
    return calls


def stream(name: str) -> str:
    """What the target's features lose under bf16 autocast, with either residual stream."""
    torch.manual_seed(0)
    config = step_config(parse_case(name))
    target = make_target(build_encoder(config))
    images = torch.randint(256, (2, *(config.data.image_size,) * 2, 3), dtype=torch.uint8)
    low = low_target(target).encoder
    with torch.no_grad():
        exact = deepcopy(target).double()(images)
        with torch.autocast("cpu", torch.bfloat16):
            fp32 = low(images)
            low.pos_embed = torch.nn.Parameter(low.pos_embed.bfloat16(), requires_grad=False)
            bf16 = low(images)
    wide, narrow = (float((x.double() - exact).abs().max()) for x in (fp32, bf16))
    bound = 2.0 * wide + torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    return f"largest error: fp32 stream {wide:.4f}, bf16 stream {narrow:.4f}, rule {bound:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.update", description=__doc__)
    parser.add_argument("--size", default="vits16-224-b8")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--step-seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    vit = given.size.partition("-")[0]
    for what, make, seconds in (
        (f"update {vit}", lambda: updates(vit), given.seconds),
        (f"step {given.size}", lambda: steps(given.size), given.step_seconds),
    ):
        if not seconds:
            continue
        found = interleaved(make(), CPU, seconds)
        for name, timing in found.items():
            times = f"{1e3 * timing.median:9.2f} ms, {len(timing.samples)} samples"
            ratio = timing.median / found["casts"].median
            sys.stdout.write(f"{what:24} {name:6} {times} {ratio:6.3f}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{stream(given.size)}\n")


if __name__ == "__main__":
    main()
