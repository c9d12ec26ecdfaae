"""Options that several commands have, checked before the work rather than after it."""

from __future__ import annotations

import os
from pathlib import Path

from njepa.config import ConfigError


def check_writable(option: str, file: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        ConfigError: it is a folder, or its folder does not exist or cannot be written.
    """
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        found = "is a folder" if file.is_dir() else f"cannot be written in {folder}"
        raise ConfigError(f"{option} {file} {found}; name a file in a folder that exists")


def chosen_device(name: str) -> str:
    """``cpu`` or ``cuda`` for ``--device auto|cpu|cuda``.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    import torch

    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return "cuda" if cuda and name != "cpu" else "cpu"
