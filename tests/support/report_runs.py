"""Run folders for the report: a network and its checkpoint, images, invented numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from njepa.data.sources import open_source
from tests.support.jobs import make_images
from tests.support.weight_sources import config_of, network, write_run

#: What no page may take for its own: labels of images, from a list file, and names of files.
MARKUP = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>"]
SCRIPT = "<script>"


def lines(n: int = 30, std: float = 0.5, rank: float = 20.0, every: int = 20) -> list[dict]:
    """A run whose features go from 0.5 and 20 dimensions to ``std`` and ``rank``."""
    found = []
    for i in range(n):
        share = i / (n - 1)
        line = {
            "step": every * i or 1, "epoch": every * i / 100, "loss": 1.0 - 0.5 * share,
            "loss_clean": 0.9 - 0.5 * share, "loss_noise": 0.95 - 0.5 * share,
            "loss_consistency": 10 ** (-3 * share), "lr": 1e-3, "wd": 0.04, "ema": 0.99,
            "feature_std": 0.5 * (std / 0.5) ** share, "rankme": 20 * (rank / 20) ** share,
            "grad_norm": 1.0 + math.sin(i), "images_per_s": 150.0, "data_wait_frac": 0.01,
        }  # fmt: skip
        found.append(line)
    return found


def write_lines(run: Path, content: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))


def report_run(
    folder: Path, method: str = "njepa", digest: str | None = None, **sections: Any
) -> Path:
    """``folder/run``: complete, of images in ``folder/images`` with labels of ``MARKUP``."""
    source = folder / "images.txt"
    if not source.exists():
        make_images(folder / "images", 40, classes=2)
        for file in list((folder / "images").rglob("*.jpg")):
            file.rename(file.with_name(f"{SCRIPT}{file.name}"))
        names = sorted(p.relative_to(folder) for p in (folder / "images").rglob("*.jpg"))
        source.write_text("".join(f"{name}\t{MARKUP[i % 2]}\n" for i, name in enumerate(names)))
    data = {"path": str(source), "eval_path": str(source), "cache_dir": str(folder / "cache")}
    config = config_of(method, data=data, **sections)
    run = folder / "run"
    digest = digest or open_source(source, folder / "cache", progress=False).digest
    write_run(run, config, *network(config), data_digest=digest, total_steps=580)
    (run / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 8}')
    write_lines(run, lines())
    return run
