"""Run folders with an encoder that nobody trained, and small labelled sources, for probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from njepa.config import dump_config, load_config
from njepa.models.encoder import build_encoder

SMALL = [
    "data.image_size=32", "model.patch_size=8", "model.width=32", "model.depth=5", "model.heads=2",
]  # fmt: skip


def make_run(folder: Path, *overrides: str) -> Path:
    """What ``njepa train`` leaves, with random weights."""
    config = load_config("shapes-tiny", [*SMALL, *overrides])
    checkpoint = folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    encoder = build_encoder(config)
    state = {name: value.detach().contiguous() for name, value in encoder.state_dict().items()}
    save_file(state, checkpoint / "target_encoder.safetensors")
    (checkpoint / "state.json").write_text("{}")
    return folder


def make_stripes(folder: Path, n: int, classes: int = 3, seed: int = 0) -> Path:
    """``n`` images in class folders; the class is the direction of the stripes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:40, 0:40]
    for i in range(n):
        angle = np.pi * (i % classes) / classes
        phase, contrast = rng.uniform(0, 6), rng.uniform(40, 90, 3)
        wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * rng.uniform(0.6, 0.9) + phase)
        pixels = 128 + contrast * wave[..., None] + 8 * rng.normal(size=(40, 40, 3))
        path = folder / f"class{i % classes}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder
