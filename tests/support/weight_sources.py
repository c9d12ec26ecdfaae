"""Small networks on disk, in every layout that can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from njepa.config import Config, dump_config, parse_config
from njepa.models.jepa import Jepa, build_jepa
from njepa.training.ema import make_target
from tests.support.written import write_checkpoint

MEAN, STD = [0.5, 0.25, 0.4], [0.2, 0.3, 0.25]


def config_of(method: str = "ijepa", **sections: dict[str, Any]) -> Config:
    """Images of 48 pixels in 6 x 6 patches; normalised in a way of its own."""
    raw: dict[str, Any] = {
        "method": method,
        "data": {"image_size": 48, "mean": MEAN, "std": STD, "path": "/home/somebody/photos"},
        "mask": {"min_keep": 2},
        "model": {
            "encoder": "vit_tiny", "patch_size": 8, "width": 32, "depth": 2, "heads": 2,
            "predictor": {"width": 24, "depth": 2, "heads": 3},
        },
    }  # fmt: skip
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return parse_config(raw)


def network(config: Config, seed: int = 0) -> tuple[Jepa, Any]:
    """Context side and target encoder, every number of them random."""
    generator = torch.Generator().manual_seed(seed)
    jepa = build_jepa(config)
    target = make_target(jepa.encoder)
    with torch.no_grad():
        for module in (jepa, target):
            for parameter in module.parameters():
                if parameter.requires_grad or module is target:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    target.pos_embed.data.copy_(jepa.encoder.pos_embed)
    return jepa, target


def write_run(folder: Path, config: Config, jepa: Jepa, target: Any, **state: Any) -> Path:
    """A run folder with one checkpoint, as the trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "summary.json").write_text(
        json.dumps({"recipe": "custom", "knn_top1": 41.25, "knn_top1_ci95": [39.5, 43.0]})
    )
    weights = {f"weight/jepa.{name}": tensor for name, tensor in jepa.state_dict().items()}
    versions = {"njepa": "0.1.0", "torch": "2.14"}
    state |= {"config": dump_config(config), "versions": versions}
    return write_checkpoint(folder, 7, weights, target.state_dict(), **state)


def published(jepa: Jepa, target: Any, prefix: str = "module.") -> dict[str, Any]:
    """The dictionary of an official file, with some of what it also holds."""
    parts = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target}
    found: dict[str, Any] = {
        key: {f"{prefix}{name}": tensor for name, tensor in part.state_dict().items()}
        for key, part in parts.items()
    }
    return {**found, "opt": {"state": {}, "param_groups": [{"lr": 0.1}]}, "scaler": None,
            "epoch": 300, "loss": 0.1, "batch_size": 16, "world_size": 8, "lr": 1e-6}  # fmt: skip


def noise_images(size: int = 48, n: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (n, size, size, 3), generator=generator, dtype=torch.uint8)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """What other libraries want: [n, 3, S, S]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images.permute(0, 3, 1, 2) / 255 - mean) / std
