"""What will run, and why that: the first lines of a run's log."""

from __future__ import annotations

import math

from njepa.choice import Choice
from njepa.runs.folder import run_dir
from njepa.runs.summary import device_name
from njepa.training.setup import Setup

_WIDTH = 11  # of the names


def start_table(run: Setup) -> str:
    """What will run, for the first lines of the log."""
    plan, length = run.plan, run.length
    config, sizes, parts = plan.config, plan.sizes, plan.parts
    trained = [p for p in run.engine.module.parameters() if p.requires_grad]
    millions = sum(getattr(p, "ds_numel", p.numel()) for p in trained) / 1e6
    by_choice: dict[Choice, list[str]] = {}
    for op, choice in plan.impl.items():
        by_choice.setdefault(choice, []).append(op)
    rows = {
        "run": f"{run_dir(config)} (recipe {config.recipe}, method {config.method})",
        "data": f"{run.index.n} images, loader {run.loader.backend}",
        "batch": f"effective {sizes.total} = {sizes.micro} x {sizes.accumulation} accumulated "
        f"x {sizes.world} ranks",
        "steps": f"{run.first_step} of {length.total_steps} done, {length.steps_per_epoch} an "
        f"epoch, {length.schedules.warmup} of warm-up",
        "model": f"{config.model.encoder}/{config.model.patch_size} at "
        f"{config.data.image_size} px: {parts.encoder.depth} blocks of width "
        f"{parts.encoder.width}; {millions:.2f} M trainable parameters in all",
        "weights": run.weights if run.first_step == 0 else "from the run's checkpoint",
        "predictor": f"{parts.predictor.depth} blocks of width {parts.predictor.width}, "
        f"context {config.model.predictor.context}",
        "device": device_name(plan.ranks.device),
        "threads": str(plan.ranks.threads),
        "precision": str(plan.precision),
        "target": str(plan.target),
        "ops": "; ".join(f"{choice}: {', '.join(ops)}" for choice, ops in by_choice.items()),
        "attention": str(plan.attention),
        "compile": str(plan.compilation),
    }
    if config.mask.static_shapes:
        rows["shapes"] = ", ".join(
            f"{count} + {math.prod(target)}"
            for count, target in sorted({(n, t) for (t, _), n in plan.masks.counts.items()})
        )
    return table(rows)


def table(rows: dict[str, str]) -> str:
    """Names to the left, what belongs to them to the right."""
    return "\n".join(f"{name:>{_WIDTH}}  {text}" for name, text in rows.items())
