"""Whether all ranks run the same: configuration, code, libraries, data; compared at the start."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import socket
from collections import Counter
from pathlib import Path

import njepa_kernels

import njepa
from njepa.config import Config, ConfigError, dump_config
from njepa.config.deepspeed_file import DeepSpeedFile
from njepa.config.reading import read_yaml
from njepa.data.errors import SourceError
from njepa.data.index import ImageIndex
from njepa.data.sources import open_source
from njepa.runs.folder import flat
from njepa.runs.place import phase
from njepa.runs.ranks import Ranks

#: Compared by version.
_LIBRARIES = (
    "torch", "deepspeed", "triton", "numpy", "torchvision", "Pillow", "safetensors",
    "nvidia-dali-cuda130",
)  # fmt: skip
_SHOWN = 5


def check_alike(ranks: Ranks, config: Config, ds: DeepSpeedFile) -> None:
    """Compare what runs on all ranks; one gather. Collective.

    Raises:
        ConfigError: on all ranks: something differs. Names the first things, with ranks and hosts.
    """
    if ranks.world == 1:
        return
    items = {f"file {name}": text for name, text in _sources().items()} | _software()
    items |= {k: repr(v) for k, v in flat(read_yaml(dump_config(config), "it")).items()}
    items |= {f"DeepSpeed file, {k}": repr(v) for k, v in flat(dict(ds.raw)).items()}
    compare(ranks.gather((socket.gethostname(), items)))


def compare(given: list[tuple[str, dict[str, str]]]) -> None:
    """Host and items of every rank.

    Raises:
        ConfigError: items that differ.
    """
    keys = dict.fromkeys(key for _, items in given for key in items)
    lines = []
    for key in keys:
        values = [items.get(key, "missing") for _, items in given]
        (usual, _), *others = Counter(values).most_common()
        if others:
            rest = [r for r, value in enumerate(values) if value != usual]
            shown = "; ".join(f"{values[r]} on rank {r} ({given[r][0]})" for r in rest[:_SHOWN])
            at = values.index(usual)
            lines.append(f"  {key}: {usual} on rank {at} ({given[at][0]}), {shown}")
    if lines:
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ConfigError(
            "the ranks do not run the same:\n" + "\n".join(lines[:_SHOWN]) + more + "\nstart all "
            "of them with the same command, files and packages; nothing has been written"
        )


def open_alike(config: Config, ranks: Ranks) -> ImageIndex:
    """The index of ``data.path``, the same on all ranks. Collective.

    Raises:
        SourceError: as ``open_source``, on all ranks; or the images differ.
    """
    found: ImageIndex | SourceError
    try:
        with phase("indexing the images"):
            progress = config.run.progress and ranks.main
            found = open_source(config.data.path, config.data.cache_dir, progress=progress)
    except SourceError as error:
        found = error
    failed = isinstance(found, SourceError)
    told = str(found) if isinstance(found, SourceError) else f"{found.n} images {found.digest}"
    given = ranks.gather((failed, told, socket.gethostname()))
    wrong = next((r for r, (bad, text, _) in enumerate(given) if bad or text != given[0][1]), None)
    if isinstance(found, ImageIndex) and wrong is None:
        return found
    if isinstance(found, SourceError):
        raise found
    assert wrong is not None
    bad, text, host = given[wrong]
    if bad:
        raise SourceError(f"rank {wrong} ({host}): {text}")
    raise SourceError(
        f"data.path={config.data.path} holds other images on rank {wrong} ({host}) than on rank 0 "
        f"({given[0][2]}): {text[:40]}... and {given[0][1][:40]}...; copy them again, so that all "
        f"hosts have the same files"
    )


def _software() -> dict[str, str]:
    found = {"njepa": njepa.__version__, "Python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    # What is built differs where compilers do; whether it is there decides what runs.
    folder = Path(njepa_kernels.__file__).parent
    found["native libraries"] = json.dumps(sorted(p.name for p in folder.glob("_native_*.so")))
    return found


def _sources() -> dict[str, str]:
    """A digest of each file of our packages."""
    digests: dict[str, str] = {}
    for package in (njepa, njepa_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            digests[str(path.relative_to(root.parent))] = digest[:12]
    return digests
