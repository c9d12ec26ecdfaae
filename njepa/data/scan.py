"""Decode every image of a source once and list the good ones (``njepa scan``)."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from njepa.config.messages import printable
from njepa.data.decode import decode
from njepa.data.errors import DecodeError, SourceError
from njepa.data.fork_guard import forking
from njepa.data.index import ImageIndex, build_index
from njepa.data.listing import find_source

_SHOWN = 20
_CHUNK = 64


@dataclass(frozen=True)
class ScanReport:
    """What a scan found; ``str()`` is for people."""

    path: Path
    out: Path | None
    """The list of good images; None where none was written (tar shards, Parquet)."""
    good: int
    bad: list[str]
    """Names of unreadable images with the reason."""

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.good} of {self.good + len(self.bad)} images are good"]
        lines += [f"  bad: {name}" for name in self.bad[:_SHOWN]]
        if len(self.bad) > _SHOWN:
            lines.append(f"  ... and {len(self.bad) - _SHOWN} more")
        if self.out is not None:
            lines.append(f"the good ones are listed in {self.out}: use data.path={self.out}")
        elif self.bad:
            lines.append(
                "a list cannot select images inside tar shards or Parquet files; write new ones "
                "without the bad images"
            )
        return printable("\n".join(lines))


def scan(
    path: Path, out: Path | None = None, workers: int | None = None, progress: bool = True
) -> ScanReport:
    """Decode every image in full and write the readable ones, with their labels, to ``out``.

    Args:
        path: folder, list file, tar shards or Parquet, as ``data.path``.
        out: list file to write, usable as ``data.path``; paths are relative to it where the images
            lie below its folder, absolute otherwise. Not written for shards or Parquet.
        workers: processes; None: one per core.
        progress: show bars, where stderr is a terminal.

    Raises:
        SourceError: nothing there, or no image is readable.
    """
    source = find_source(Path(path).expanduser())
    index = build_index(source, progress)
    workers = workers or len(os.sched_getaffinity(0))
    chunks = [range(i, min(i + _CHUNK, index.n)) for i in range(0, index.n, _CHUNK)]
    faults: dict[int, str] = {}
    pool = ProcessPoolExecutor(workers, get_context("fork"), _init_worker, (index,))
    quiet = None if progress else True  # tqdm: None is quiet where stderr is no terminal
    with pool, tqdm(total=index.n, desc="decoding", unit="img", disable=quiet) as bar:
        with forking():  # ``map`` starts the processes
            results = pool.map(_faults, chunks)
        for chunk, found in zip(chunks, results, strict=True):
            faults |= found
            bar.update(len(chunk))
    if out is not None:
        unlisted = (i for i, name in enumerate(index.names) if "\t" in name or "\n" in name)
        faults |= dict.fromkeys(unlisted, "a list cannot hold a name with a tab or a line break")
    good = [i for i in range(index.n) if i not in faults]
    bad = sorted(index.unreadable + [f"{index.name(i)} ({why})" for i, why in faults.items()])
    if not good:
        raise SourceError(f"data: no image of {path} is readable: {'; '.join(bad[:5])}")
    if out is not None and not index.shards:
        _write_list(Path(out), index, good)
    else:
        out = None
    return ScanReport(Path(path), out, len(good), bad)


def _write_list(out: Path, index: ImageIndex, good: list[int]) -> None:
    folder = out.absolute().parent
    lines = []
    for i in good:
        path = index.root / index.name(i)
        name = path.relative_to(folder) if path.is_relative_to(folder) else path
        label = "" if index.labels is None else f"\t{index.classes[index.labels[i]]}"
        lines.append(f"{name.as_posix()}{label}\n")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, out)


_index: ImageIndex | None = None  # of a worker process


def _init_worker(index: ImageIndex) -> None:
    global _index
    _index = index
    torch.set_num_threads(1)


def _faults(chunk: range) -> dict[int, str]:
    assert _index is not None  # set by _init_worker
    found: dict[int, str] = {}
    for i in chunk:
        try:
            decode(_index.read(i))
        except (OSError, DecodeError) as error:
            found[i] = str(error)
    return found
