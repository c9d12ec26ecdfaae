"""Tensors from files that others wrote: nothing in them is ever run.

safetensors hold no code. Torch files are pickles, and are read by torch's restricted reader
(``weights_only=True``), which knows tensors and plain values and refuses everything else.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from njepa.config import ConfigError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped into memory.

    Raises:
        ConfigError: damaged or unreadable.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # a header that lies makes the reader raise almost anything
        raise _damaged(path, error) from None
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that a safetensors file carries beside its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # as above
        raise _damaged(path, error) from None


def read_torch(path: Path) -> Any:
    """What a torch file holds, mapped into memory where its format allows that.

    Raises:
        ConfigError: damaged, or a pickle of more than tensors and plain values.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        if not mapped and _first_byte(path) != pickle.PROTO:
            raise ValueError("it does not begin as a file of torch.save")
        with warnings.catch_warnings():  # of a pickle protocol that torch.save does not write
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} is refused: expected tensors and plain values, got a pickle of other things, "
            f"and loading those can run code ({_reason(error)}). Where you trust its origin, save "
            f"its state dicts alone, as safetensors or by torch.save"
        ) from None
    except Exception as error:  # a damaged pickle makes the reader raise almost anything
        raise _damaged(path, error) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: not there, or not one.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    return as_object(found, str(path))


def as_object(found: object, what: str) -> dict[str, Any]:
    """``found``, if it is a JSON object.

    Raises:
        ConfigError: it is something else; names ``what``.
    """
    if not isinstance(found, dict):
        raise ConfigError(f"{what} must hold a JSON object, got {type(found).__name__}")
    return found


def _damaged(path: Path, error: Exception) -> ConfigError:
    size = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    return ConfigError(
        f"{path} cannot be read ({size}): {_reason(error)}; expected a complete "
        f"{'JSON' if path.suffix == '.json' else 'weights'} file, copy or download it again"
    )


def _reason(error: Exception) -> str:
    """The sentence of a long message that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "unsupported" in line.lower()]
    text = (telling or lines or [type(error).__name__])[0].split(". ")[0].rstrip(".")
    return text if len(text) < 200 else f"{text[:200]} ..."


def _first_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1)
