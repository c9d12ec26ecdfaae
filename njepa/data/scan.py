"""Decode every image of a source once and list the good ones (``njepa scan``)."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from njepa.atomic import write_atomically
from njepa.config import ConfigError
from njepa.config.messages import printable
from njepa.data.decode_team import faults
from njepa.data.errors import SourceError
from njepa.data.index import ImageIndex, build_index
from njepa.data.listing import find_source
from njepa.data.scan_journal import ScanJournal

_SHOWN = 20
_CHUNK = 64

#: What the reason of a bad image holds (in small letters), and how the report counts it.
_KINDS = {
    "empty file": "empty",
    "not an image": "not an image",
    "truncated": "truncated",
    "decompression bomb": "too many pixels",
    "permission denied": "permission denied",
    "no such file": "missing",
    "ends the process": "crashes the decoder",
    "a list cannot hold": "name that a list cannot hold",
}


@dataclass(frozen=True)
class ScanReport:
    """What a scan found; ``str()`` is for people."""

    path: Path
    out: Path | None
    """The list of good images; None where none was written (tar shards, Parquet)."""
    good: int
    bad: list[str]
    """Names of unreadable images with the reason."""
    known: int = 0
    """Images that an interrupted scan had decoded."""

    @property
    def kinds(self) -> Counter[str]:
        """How many bad images there are of each kind."""
        return Counter(
            next(
                (kind for text, kind in _KINDS.items() if text in line.lower()), "damaged otherwise"
            )
            for line in self.bad
        )

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.good} of {self.good + len(self.bad)} images are good"]
        if self.known:
            lines[0] += f" ({self.known} of them seen by the scan that was interrupted)"
        if self.bad:
            kinds = self.kinds.most_common()
            lines.append(f"  bad: {', '.join(f'{n} {kind}' for kind, n in kinds)}")
        lines += [f"    {name}" for name in self.bad[:_SHOWN]]
        if len(self.bad) > _SHOWN:
            lines.append(f"    ... and {len(self.bad) - _SHOWN} more")
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

    What is done is kept in a file beside ``out`` until the end: a scan that was interrupted goes on
    there, if the source has not changed.

    Args:
        path: folder, list file, tar shards or Parquet, as ``data.path``.
        out: list file to write, usable as ``data.path``; paths are relative to it where the images
            lie below its folder, absolute otherwise. Not written for shards or Parquet.
        workers: processes; None: one per core.
        progress: show bars, where stderr is a terminal.

    Raises:
        SourceError: nothing there, or no image is readable. ConfigError: ``out`` cannot be written;
            what was decoded by then is kept, and the next scan goes on there.
    """
    source = find_source(Path(path).expanduser())
    try:
        journal = ScanJournal(out, f"{source.fingerprint()} by {_CHUNK}")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None
    with journal:
        index = build_index(source, progress)
        bad = _decode(index, journal, workers or len(os.sched_getaffinity(0)), progress)
    known = sum(min(_CHUNK, index.n - k * _CHUNK) for k in journal.done)
    if out is not None:
        unlisted = (i for i, name in enumerate(index.names) if "\t" in name or "\n" in name)
        bad |= dict.fromkeys(unlisted, "a list cannot hold a name with a tab or a line break")
    good = [i for i in range(index.n) if i not in bad]
    named = sorted(index.unreadable + [f"{index.name(i)} ({why})" for i, why in bad.items()])
    if not good:
        journal.remove()
        raise SourceError(f"data: no image of {path} is readable: {'; '.join(named[:5])}")
    if out is not None and not index.shards:
        _write_list(Path(out), index, good)
    else:
        out = None
    journal.remove()
    return ScanReport(Path(path), out, len(good), named, known)


def _decode(
    index: ImageIndex, journal: ScanJournal, workers: int, progress: bool
) -> dict[int, str]:
    """The bad samples of an index with the reasons; what the journal knows is not decoded."""
    chunks = [range(i, min(i + _CHUNK, index.n)) for i in range(0, index.n, _CHUNK)]
    todo = [chunk for k, chunk in enumerate(chunks) if k not in journal.done]
    bad = {i: why for found in journal.done.values() for i, why in found.items()}
    missing = [len(chunk) for chunk in chunks]
    known = index.n - sum(len(chunk) for chunk in todo)
    quiet = None if progress else True  # tqdm: None is quiet where stderr is no terminal
    with tqdm(total=index.n, initial=known, desc="decoding", unit="img", disable=quiet) as bar:
        for i, fault in faults(index, todo, workers):
            k = i // _CHUNK
            if fault:
                bad[i] = fault
            missing[k] -= 1
            if not missing[k]:
                journal.add(k, {j: bad[j] for j in chunks[k] if j in bad})
            bar.update()
    return bad


def _write_list(out: Path, index: ImageIndex, good: list[int]) -> None:
    folder = out.absolute().parent
    lines = []
    for i in good:
        path = index.root / index.name(i)
        name = path.relative_to(folder) if path.is_relative_to(folder) else path
        label = "" if index.labels is None else f"\t{index.classes[index.labels[i]]}"
        lines.append(f"{name.as_posix()}{label}\n")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(out, "".join(lines))
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written: {error.strerror}; make room, and the same command "
            f"writes it without decoding again"
        ) from None
