"""For probes: runs with an encoder that nobody trained, small labelled sources, the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from njepa import cli
from njepa.config import dump_config, load_config
from njepa.models.encoder import build_encoder
from tests.support.written import write_checkpoint

SMALL = [
    "data.image_size=32", "model.patch_size=8", "model.width=32", "model.depth=5", "model.heads=2",
]  # fmt: skip


def make_run(folder: Path, *overrides: str, target: dict[str, Tensor] | None = None) -> Path:
    """What ``njepa train`` leaves, with random weights or ``target``."""
    config = load_config("shapes-tiny", [*SMALL, *overrides])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    target = target or build_encoder(config).state_dict()
    write_checkpoint(folder, 10, {}, target, config=dump_config(config))
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


def probe_arguments(
    root: Path, subject: str, *more: str, train: str = "train", test: str = "test"
) -> list[str]:
    """``njepa probe`` of a subject in ``root``, which holds the sources and the cache, too."""
    return [
        "probe", str(root / subject), "--train", str(root / train), "--test", str(root / test),
        "--cache", str(root / "cache"), "--device", "cpu", *more,
    ]  # fmt: skip


def refusal(capsys: Any, argv: list[str]) -> str:
    """The one message of a command whose input cannot work."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("njepa: ")
    assert "Traceback" not in err
    assert not out
    return str(err)
