"""Options that several commands have, checked before the work rather than after it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from njepa.atomic import is_place
from njepa.config import ConfigError


def check_writable(option: str, file: Path) -> None:
    """Refuse a file that cannot be written; what is there stays as it is.

    Raises:
        ConfigError: it is a folder, or no file can be made in its folder.
    """
    if file.is_dir():
        raise ConfigError(f"{option} {file} is a folder; name a file in a folder that exists")
    try:
        if not is_place(file):
            with tempfile.TemporaryFile(dir=file.parent):  # root may, in places where nobody can
                pass
        elif file.exists() and not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"{option} {file} cannot be written in {file.parent}: {error.strerror}; name a file in "
            f"a folder that exists and can be written"
        ) from None


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
