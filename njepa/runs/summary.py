"""What a person reads of a run: its device, its result."""

from __future__ import annotations

from typing import Any

import torch


class SummaryFailed(RuntimeError):
    """summary.json could not be written; the run is done, and all else of it is whole."""


def summary_table(summary: dict[str, Any]) -> str:
    """What a person wants to see first of summary.json."""
    first, last = summary["loss_first"], summary["loss_last"]
    losses = "never finite" if first is None else f"{first:.4f} -> {last:.4f}"
    rows = {"loss": f"{losses} in {summary['steps']} steps, {summary['images_per_s']:.0f} images/s"}
    plain = "context" if summary["eval_which"] == "context" else "target"
    names = {
        "knn_top1": f"kNN top-1, {plain} encoder",
        "knn_top1_context": "kNN top-1, context encoder",
        "knn_top1_init": "kNN top-1, untrained",
        "knn_top1_pixels": "kNN top-1, raw pixels",
        "linear_top1": f"linear probe, {plain} encoder",
        "linear_top1_context": "linear probe, context encoder",
        "linear_top1_init": "linear probe, untrained",
    }
    for key, name in names.items():
        if key in summary:
            low, high = summary[f"{key}_ci95"]
            rows[name] = f"{summary[key]:.1f} %   (95 % interval {low:.1f} to {high:.1f})"
    return "\n".join(f"{name:>29}  {text}" for name, text in rows.items())


def device_name(device: torch.device) -> str:
    """``NVIDIA H200``, or the CPU's architecture and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)}"
