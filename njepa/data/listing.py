"""Where images come from: a folder, a list file, tar shards or Parquet. Nothing is decoded here.

A source is listed in two steps: ``find_source`` looks at names, sizes and times (cheap: done at
every start to see whether a cached index is still valid), ``list_entries`` finds the images in it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from njepa.data.errors import SourceError
from njepa.data.folders import THREADS, Watch, walk
from njepa.data.idx import is_idx
from njepa.data.parquet_layout import require_pyarrow
from njepa.data.tar import EXTENSIONS, shard_rows

Int64Array = npt.NDArray[np.int64]

EXPECTED = (
    "data.path takes a folder of images (nested or not), a list file (.txt, one path per line), "
    "or tar shards or Parquet (a .tar or .parquet file, a folder of them, or a pattern such as "
    "train-{0000..0099}.tar or train-*.parquet); image names end in "
    + " ".join(EXTENSIONS)
    + ". A zip or MNIST's idx files are converted first: njepa convert SOURCE OUT"
)
#: Files that a pattern such as {0000..0099} stands for.
MOST_SHARDS = 1_000_000
_CONTAINERS = {"shards": "tar shards", "parquet": "Parquet files"}
_SPLIT = re.compile(r"^(.+?)-\d+(-of-\d+)?\.parquet$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """What can be known without opening a file.

    ``files`` are images (folder, list), tar shards or Parquet files, relative to ``root`` where
    they lie under it.
    """

    kind: Literal["folder", "list", "shards", "parquet"]
    path: Path
    root: Path
    files: list[str]
    sizes: Int64Array
    """Bytes of each file; -1: missing."""
    times: Int64Array
    """Modification times in ns."""
    labels: list[str] | None = None
    watch: Watch | None = None
    """What shows without a look at every file that nothing has changed; None: few files."""

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, touched or resized."""
        text = "\n".join([self.kind, str(self.path), *self.files, *(self.labels or [])])
        digest = hashlib.sha256(os.fsencode(text))
        digest.update(self.sizes.tobytes())
        digest.update(self.times.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Entries:
    """The images of a source, in the order of their sample ids; ``shard`` -1: a file of its own."""

    names: list[str]
    labels: list[str] | None
    sizes: Int64Array
    shard: Int64Array
    offsets: Int64Array


def find_source(path: Path, progress: bool = False) -> Source:
    """List a source.

    Args:
        progress: count the files of a folder on stderr, where it is a terminal.

    Raises:
        SourceError: nothing at ``path``, or nothing in it that could be an image.
    """
    try:
        return _find(path, progress)
    except OSError as error:
        raise SourceError(f"data: {path} cannot be listed: {error}") from error


def _find(path: Path, progress: bool) -> Source:
    text = os.fspath(path)
    if re.search(r"[{*?\[]", text) and not path.exists():
        return _containers(path, _expand(text))
    if not path.exists():
        parent = next((p for p in path.absolute().parents if p.exists()), None)
        hint = f" (the nearest that exists is {parent})" if parent else ""
        raise SourceError(f"data: {path} does not exist{hint}. {EXPECTED}")
    if path.is_dir():
        return _folder(path, progress)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _list_file(path)
    if suffix in (".tar", ".parquet") or re.search(r"\.tar\.\w+$|\.tgz$", path.name.lower()):
        return _containers(path, [text])
    if suffix == ".zip" or is_idx(path):
        kind = "a zip" if suffix == ".zip" else "an idx file (MNIST's format)"
        raise SourceError(
            f"data: {path} is {kind}, which is not read in place; convert it once, and give the "
            f"folder OUT instead: njepa convert {path} OUT"
        )
    raise SourceError(f"data: {path} is a file whose name ends in {suffix!r}. {EXPECTED}")


def list_entries(source: Source, progress: Iterable[int] | None = None) -> Entries:
    """The images of ``source``; reads the headers of tar shards.

    Args:
        progress: wraps the indices of the shards (a progress bar).
    """
    if source.kind != "shards":
        none = np.full(len(source.files), -1, dtype=np.int64)
        return Entries(source.files, source.labels, source.sizes, none, np.zeros_like(none))
    rows: list[tuple[str, str | None, int, int, int]] = []
    for k in progress if progress is not None else range(len(source.files)):
        rows += [(*row, k) for row in shard_rows(source.root, source.files[k])]
    if not rows:
        raise SourceError(
            f"data: no image in the {len(source.files)} tar shard(s) of {source.path}. {EXPECTED}"
        )
    names, labels, offsets, sizes, shard = zip(*rows, strict=True)
    known = [label for label in labels if label is not None]
    return Entries(
        list(names),
        known if len(known) == len(rows) else None,
        np.array(sizes, dtype=np.int64),
        np.array(shard, dtype=np.int64),
        np.array(offsets, dtype=np.int64),
    )


def _folder(path: Path, progress: bool) -> Source:
    root = path.absolute()
    files, watch = walk(root, progress)
    images = [f for f in files if _is_image(f[0])]
    shards = [f[0] for f in files if f[0].lower().endswith((".tar", ".parquet"))]
    if not images and shards:
        return _containers(root, [str(root / name) for name in shards])
    if not images:
        kinds = Counter(os.path.splitext(name)[1] or "no extension" for name, _, _ in files)
        got = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5)) or "no file at all"
        raise SourceError(f"data: no image in the folder {path}; found {got}. {EXPECTED}")
    names = [name for name, _, _ in images]
    labelled = all("/" in name for name in names)
    return Source(
        "folder",
        root,
        root,
        names,
        np.array([size for _, size, _ in images], dtype=np.int64),
        np.array([time for _, _, time in images], dtype=np.int64),
        [name.split("/", 1)[0] for name in names] if labelled else None,
        watch,
    )


def _list_file(path: Path) -> Source:
    root = path.absolute().parent
    rows: list[tuple[str, str | None]] = []
    listed = time.time_ns()
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        name, tab, label = line.rstrip("\r").partition("\t")
        if not name:
            continue
        rows.append((Path(name).as_posix(), label.strip() if tab else None))
        if (rows[0][1] is None) != (rows[-1][1] is None):
            raise SourceError(
                f"data: {path}, line {number}: either every line has a label or none; "
                f"expected a path, or a path, a tab and a label, got {line!r}"
            )
    if not rows:
        raise SourceError(f"data: the list file {path} is empty. {EXPECTED}")
    rows.sort(key=lambda row: os.fsencode(row[0]))
    names = [name for name, _ in rows]
    paths = [os.path.join(root, name) for name in names]
    watch = Watch.of([str(path.absolute()), *{os.path.dirname(p): None for p in paths}], listed)
    sizes, times = _stat(paths)
    labels = [label for _, label in rows if label is not None]
    return Source("list", path.absolute(), root, names, sizes, times, labels or None, watch)


def _containers(path: Path, files: list[str]) -> Source:
    """Tar shards or Parquet files; ``path`` is what the user named."""
    if not files:
        raise SourceError(f"data: no file matches {path}. {EXPECTED}")
    parquet = [file for file in files if file.lower().endswith(".parquet")]
    if parquet and len(parquet) < len(files):
        raise SourceError(
            f"data: {path} holds {len(parquet)} Parquet files and {len(files) - len(parquet)} tar "
            f"shards, expected one kind; give data.path a pattern such as {path}/*.parquet"
        )
    kind: Literal["shards", "parquet"] = "parquet" if parquet else "shards"
    sizes, times = _stat(files)
    missing = [file for file, size in zip(files, sizes, strict=True) if size < 0]
    if missing:
        raise SourceError(
            f"data: {len(missing)} of the {len(files)} {_CONTAINERS[kind]} of {path} do not exist, "
            f"the first is {missing[0]}"
        )
    whole = [os.path.abspath(file) for file in files]
    root = Path(os.path.commonpath([os.path.dirname(file) for file in whole]))
    names = [Path(file).relative_to(root).as_posix() for file in whole]
    if parquet:
        require_pyarrow(path)
        _check_splits(path, names)
    return Source(kind, path.absolute(), root, names, sizes, times)


def _check_splits(path: Path, names: list[str]) -> None:
    """Hugging Face keeps train and test files in one folder; training on both would be a leak."""
    splits = Counter(m[1] for name in names if (m := _SPLIT.match(name.rpartition("/")[2])))
    if len(splits) > 1 and path.is_dir():
        found = ", ".join(f"{split} ({n} files)" for split, n in sorted(splits.items()))
        raise SourceError(
            f"data: {path} holds the Parquet files of several splits: {found}; name one: "
            f"data.path={path}/{next(iter(splits))}-*.parquet"
        )


def _stat(paths: list[str]) -> tuple[Int64Array, Int64Array]:
    """Bytes and modification times; -1 where there is no regular file."""

    def one(path: str) -> tuple[int, int]:
        try:
            found = os.stat(path)
        except (OSError, ValueError):  # no such file, or a NUL in its name
            return -1, -1
        # Opening a pipe waits for ever, reading a device never ends.
        return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (-1, -1)

    with ThreadPoolExecutor(THREADS) as pool:
        both = np.array(list(pool.map(one, paths, chunksize=256)), dtype=np.int64).reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].copy()


def _expand(pattern: str) -> list[str]:
    """Braces ({000..146}, {a,b}) as in a shell, then ``*``, ``?`` and ``[...]``; sorted."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return sorted(glob.glob(pattern)) if re.search(r"[*?\[]", pattern) else [pattern]
    inner, head, tail = match.group(1), pattern[: match.start()], pattern[match.end() :]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if bounds:
        first, last = bounds.groups()
        if int(last) - int(first) >= MOST_SHARDS:
            raise SourceError(
                f"data: {{{inner}}} in {pattern} stands for {int(last) - int(first) + 1} files, at "
                f"most {MOST_SHARDS} are taken"
            )
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        parts = [f"{k:0{width}d}" for k in range(int(first), int(last) + 1)]
    else:
        parts = inner.split(",")
    return [path for part in parts for path in _expand(head + part + tail)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)
