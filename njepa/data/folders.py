"""All files below a folder, and a cheap way to see later that they are still the same."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

Int64Array = npt.NDArray[np.int64]

THREADS = 16  # they wait for the disk or the network, not for a core

_SETTLED = 2_000_000_000  # ns: a folder changed twice within a tick of the clock has one time
_SAMPLED = 1000

Found = tuple[str, int, int]  # relative posix name, bytes, modification time in ns
_Folder = tuple[str, str, frozenset[tuple[int, int]]]  # path, prefix of names, inodes above


@dataclass(frozen=True)
class Watch:
    """Times of the folders of a listing.

    Adding, removing, renaming or replacing a file changes its folder's time. Writing into a file
    does not: of those the sizes of a sample are compared.
    """

    paths: list[str]
    """Folders, and the list file where there is one."""
    times: Int64Array
    """Times of change (ctime, which cannot be set back) in ns, taken before they were listed."""
    listed: int
    """When the listing began, in ns."""

    @classmethod
    def of(cls, paths: list[str], listed: int) -> Watch:
        return cls(paths, _times(paths), listed)

    def holds(self, root: Path, names: Sequence[str], sizes: Int64Array) -> bool:
        """Whether a listing with these files is still true, as far as the times can say.

        A time that is unknown, or so near to the listing that a later change could hide behind it,
        proves nothing.
        """
        if not self.paths or self.times.min() <= 0 or self.times.max() > self.listed - _SETTLED:
            return False
        if not np.array_equal(_times(self.paths), self.times):
            return False
        step = max(1, len(names) // _SAMPLED)
        return all(
            _size(os.path.join(root, names[i])) == sizes[i] for i in range(0, len(names), step)
        )


def walk(root: Path, progress: bool = False) -> tuple[list[Found], Watch]:
    """All files below ``root`` in the order of their names; links are followed, loops are cut.

    Args:
        progress: count them on stderr, where it is a terminal.
    """
    listed = time.time_ns()
    files: list[Found] = []
    folders: list[tuple[str, int]] = []
    level: list[_Folder] = [(str(root), "", frozenset())]
    bar = tqdm(desc=f"listing {root}", unit="file", disable=None if progress else True)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        while level:
            below: list[_Folder] = []
            for folder, (changed, found, deeper) in zip(level, pool.map(_scan, level), strict=True):
                folders.append((folder[0], changed))
                files += found
                below += deeper
                bar.update(len(found))
            level = below
    files.sort(key=lambda f: os.fsencode(f[0]))
    times = np.array([changed for _, changed in folders], dtype=np.int64)
    return files, Watch([path for path, _ in folders], times, listed)


def _scan(folder: _Folder) -> tuple[int, list[Found], list[_Folder]]:
    """The folder's time, its files and the folders in it."""
    path, prefix, above = folder
    here = os.stat(path)
    above = above | {(here.st_dev, here.st_ino)}
    files: list[Found] = []
    below: list[_Folder] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            try:
                stat = entry.stat()
            except OSError:  # a broken link, or a file that has just been removed
                continue
            if entry.is_dir() and (stat.st_dev, stat.st_ino) not in above:
                below.append((entry.path, f"{prefix}{entry.name}/", above))
            elif entry.is_file():
                files.append((prefix + entry.name, stat.st_size, stat.st_mtime_ns))
    return here.st_ctime_ns, files, below


def _times(paths: list[str]) -> Int64Array:
    """Times of change in ns; -1 where there is nothing."""

    def one(path: str) -> int:
        try:
            return os.stat(path).st_ctime_ns
        except (OSError, ValueError):  # gone, or a NUL in its name
            return -1

    with ThreadPoolExecutor(THREADS) as pool:
        return np.array(list(pool.map(one, paths, chunksize=256)), dtype=np.int64)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1
