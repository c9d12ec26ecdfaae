"""The files of a checkpoint: an index of what is where, a checksum of each, and their reader.

``index.json`` is written last and lists every other file with size and CRC-32, and every tensor
with its shape and the ranges it lies in. Reading needs no knowledge of ranks or ZeRO stages, and
nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from njepa.config import ConfigError
from njepa.runs.snapshot import Written, read_back, write_file

INDEX, STATE, TARGET = "index.json", "state.json", "target_encoder.safetensors"
LAYOUT = 2
"""Of these files; the first one were DeepSpeed's pickles."""


class DamagedCheckpoint(ConfigError):
    """A file is missing, cut short or altered; names it."""


def shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def write_index(folder: Path, files: dict[str, Written], pieces: dict[str, Iterable[Any]]) -> None:
    """Write the index of a folder.

    Args:
        files: all others in it.
        pieces: by shard, ``Snapshot.pieces``.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name, listed in sorted(pieces.items()):
        for key, start, count, shape in listed:
            entry = tensors.setdefault(key, {"shape": shape, "pieces": []})
            entry["pieces"].append([name, start, count])
    index = {
        "layout": LAYOUT,
        "files": {name: written._asdict() for name, written in sorted(files.items())},
        "tensors": {key: tensors[key] for key in sorted(tensors)},
    }
    write_file(folder / INDEX, json.dumps(index) + "\n")


class CheckpointFiles:
    """Reads a checkpoint; nothing is verified but what ``verify`` is asked to.

    Raises:
        DamagedCheckpoint: the index cannot be read.
        ConfigError: an older version of this trainer wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._handles = folder, dict[str, Any]()
        if not (folder / INDEX).is_file() and (folder / STATE).is_file():
            refuse_pickles(folder)
        index = self._json(INDEX)
        try:
            if index["layout"] != LAYOUT:
                raise ConfigError(
                    f"{folder} has layout {index['layout']!r}, this version reads layout {LAYOUT}; "
                    f"use the version of njepa that wrote it"
                )
            self._files = {n: Written(f["bytes"], f["crc32"]) for n, f in index["files"].items()}
            self._tensors: dict[str, tuple[tuple[int, ...], list[tuple[str, int, int]]]] = {
                key: (
                    tuple(map(int, entry["shape"])),
                    sorted([(f, int(a), int(n)) for f, a, n in entry["pieces"]], key=_start),
                )
                for key, entry in index["tensors"].items()
            }
            for _, pieces in self._tensors.values():
                for name, start, count in pieces:
                    if name not in self._files or start < 0 or count < 1:
                        raise ValueError(f"a range {name!r}, {start}, {count}")
            if outside := [name for name in self._files if not is_plain_name(name)]:
                raise ValueError(f"files outside of the folder: {outside}")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._damaged(INDEX, f"it holds what no index does ({error})") from None

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def keys(self, prefix: str = "") -> list[str]:
        return [key for key in self._tensors if key.startswith(prefix)]

    def state(self) -> dict[str, Any]:
        """``state.json``."""
        return self._json(STATE)

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Read whole files, by default all, and compare with their checksums.

        Raises:
            DamagedCheckpoint: names the first that differs.
        """
        for name in self._files if names is None else names:
            expected = self._files.get(name)
            if expected is None:
                raise self._damaged(INDEX, f"it does not list {name}")
            try:
                found = read_back(self.folder / name)
            except (OSError, ValueError) as error:  # ValueError: no file can have that name
                raise self._damaged(name, getattr(error, "strerror", str(error))) from None
            if found.bytes != expected.bytes:
                raise self._damaged(
                    name, f"it has {found.bytes} bytes, {expected.bytes} were written"
                )
            if found != expected:
                raise self._damaged(
                    name, f"its checksum is {found.crc32}, {expected.crc32} was written"
                )

    def read(self, key: str, start: int, count: int) -> Tensor:
        """``count`` values of a flattened tensor from ``start`` on, 1-D.

        Raises:
            DamagedCheckpoint: they are not there.
        """
        parts, at = list[Tensor](), start
        for name, begin, size in self._tensors.get(key, ((), []))[1]:
            low, high = max(at, begin), min(start + count, begin + size)
            if low == at and low < high:
                values = self._values(name, key).view(-1)
                if len(values) != size:
                    raise self._damaged(name, f"{key} has {len(values)} values, not {size}")
                parts.append(values[low - begin : high - begin])
                at = high
        if at != start + count or not parts:
            raise self._damaged(INDEX, f"{key}[{at}:{start + count}] is in no file")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, key: str) -> Tensor:
        """A tensor in its shape."""
        if key not in self._tensors:
            raise self._damaged(INDEX, f"it has no tensor {key}")
        shape = self._tensors[key][0]
        return self.read(key, 0, math.prod(shape)).view(shape)

    def target(self, name: str) -> Tensor:
        """A tensor of the target encoder."""
        return self._values(TARGET, name)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The weights whose names in the trained module begin so, without that beginning.

        A parameter that belongs to several modules is found in each of them.
        """
        names = {key.removeprefix("weight/"): key for key in self.keys("weight/")}
        shared = self.state().get("shared")
        if isinstance(shared, dict):
            names |= {name: f"weight/{first}" for name, first in shared.items()}
        return {
            name.removeprefix(prefix): self.whole(key).float()
            for name, key in names.items()
            if name.startswith(prefix)
        }

    def _values(self, name: str, key: str) -> Tensor:
        try:
            if name not in self._handles:
                self._handles[name] = safe_open(self.folder / name, framework="pt")
            tensor: Tensor = self._handles[name].get_tensor(key)
        except Exception as error:  # a header that lies makes the reader raise almost anything
            raise self._damaged(name, str(error)) from None
        return tensor

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / name).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(name, str(error)) from None
        if not isinstance(found, dict):
            raise self._damaged(name, f"it holds {type(found).__name__}, not an object")
        return found

    def _damaged(self, name: str, why: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"checkpoint {self.folder} is damaged: {name}: {why}")


def refuse_pickles(folder: Path) -> None:
    """Raise what is to be said of a checkpoint of the first layout."""
    try:
        version = json.loads((folder / STATE).read_text())["versions"]["njepa"]
    except (OSError, ValueError, KeyError, TypeError):
        version = "of unknown number"
    raise ConfigError(
        f"{folder} was written by an older njepa (version {version}), as DeepSpeed's pickles; they "
        f"are not read any more, because a pickle can run code; finish this run with the version "
        f"that began it, or start a new one with model.init_from={folder / TARGET}"
    )


def is_plain_name(name: object) -> bool:
    """Whether a file of that name lies in the folder that names it."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


def _start(piece: tuple[str, int, int]) -> int:
    return piece[1]
