"""Write the images of any source as tar shards or class folders (``njepa convert``)."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from tqdm import tqdm

from njepa.config import ConfigError
from njepa.config.messages import printable
from njepa.data.convert_sources import Item, open_images
from njepa.data.errors import SourceError

_SHOWN = 20


@dataclass(frozen=True)
class ConvertReport:
    """What was written and what was not; ``str()`` is for people."""

    source: Path
    out: Path
    images: int
    classes: int
    files: int
    left_out: list[str]
    """Names with the reason."""

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.images} images of {self.classes or 'no'} classes in "
            f"{self.files} files: use data.path={self.out}"
        ]
        if self.left_out:
            lines.append(f"left out {len(self.left_out)}:")
        lines += [f"  {name}" for name in self.left_out[:_SHOWN]]
        if len(self.left_out) > _SHOWN:
            lines.append(f"  ... and {len(self.left_out) - _SHOWN} more")
        return printable("\n".join(lines))


def convert(
    path: Path, out: Path, to: Literal["shards", "folders"] = "shards",
    shard_bytes: int = 1 << 30, progress: bool = True,
) -> ConvertReport:  # fmt: skip
    """Copy every readable image, encoded as it is, in the order of the sample ids.

    Images of idx files become PNG; all others are copied byte by byte. ``out`` is written under a
    temporary name beside it and renamed when it is complete, so it is whole or not there.

    Args:
        path: any ``data.path``, a zip, or the images of an idx pair.
        out: folder to make. Shards: ``shard-000000.tar`` with the members ``00000000.jpg`` and,
            where there are labels, ``00000000.cls`` (the class name). Folders:
            ``<class>/00000000.jpg``.
        shard_bytes: images of one shard; a larger one has a shard of its own.

    Raises:
        ConfigError: ``out`` exists or cannot be written. SourceError: nothing to convert.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"convert: {out} exists, expected a new folder; choose another name or remove it"
        )
    if not out.name:
        raise ConfigError(f"convert: {out} is no name of a folder to make")
    images = open_images(path, progress)
    temporary = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(temporary.parent).free
        if images.size > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary.mkdir()
    except OSError as error:
        raise _unwritable(out, error, images.size) from None
    try:
        writer: _Writer = _Shards(temporary, shard_bytes) if to == "shards" else _Folders(temporary)
        classes, n = set(), 0
        quiet = None if progress else True  # tqdm: None is quiet where stderr is no terminal
        with contextlib.closing(writer):
            bar = tqdm(images.items, "converting", images.total, unit="img", disable=quiet)
            for n, item in enumerate(bar, start=1):
                writer.add(n - 1, item)
                classes.add(item.label)
            writer.finish()
        if not n:
            raise SourceError(
                f"data: none of the {images.total} images of {path} is readable: "
                f"{'; '.join(images.left_out[:5])}"
            )
        os.rename(temporary, out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritable(out, error, images.size) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return ConvertReport(path, out, n, len(classes - {None}), writer.files, sorted(images.left_out))


def _unwritable(out: Path, error: OSError, size: int) -> ConfigError:
    needed = f" ({size / 2**20:.0f} MiB are needed)" if error.errno == errno.ENOSPC and size else ""
    reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return ConfigError(
        f"convert: {out} cannot be written: {reason}{needed}; nothing is left of "
        f"it: make room or choose another place"
    )


class _Writer(Protocol):
    files: int

    def add(self, number: int, item: Item) -> None: ...

    def finish(self) -> None:
        """Everything is on the disk."""

    def close(self) -> None:
        """Also after an error; raises none."""


class _Shards:
    """Plain tar files in WebDataset layout, the same bytes whoever writes them and when."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit, self._bytes = folder, limit, 0
        self._file: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None
        self.files = 0

    def add(self, number: int, item: Item) -> None:
        if self._tar is None or self._bytes + len(item.data) > self._limit:
            self.finish()
            self._file = (self._folder / f"shard-{self.files:06d}.tar").open("xb")
            self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
            self._bytes = 0
            self.files += 1
        self._bytes += len(item.data)
        _add(self._tar, f"{number:08d}.{item.extension}", item.data)
        if item.label is not None:
            _add(self._tar, f"{number:08d}.cls", item.label.encode("utf-8", "surrogateescape"))

    def finish(self) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._tar = self._file = None

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # that of a full disk again
                self._file.close()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


class _Folders:
    """A folder for each class."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._of_label: dict[str | None, Path] = {None: folder}
        self.files = 0

    def add(self, number: int, item: Item) -> None:
        if item.label not in self._of_label:
            self._of_label[item.label] = self._make(item.label or "")
        file = self._of_label[item.label] / f"{number:08d}.{item.extension}"
        file.write_bytes(item.data)
        self.files += 1

    def _make(self, label: str) -> Path:
        name = label.replace("/", "_").replace("\0", "_")
        name = f"_{name[1:]}" if name.startswith(".") else name
        folder = self._folder / (name or "_")
        if folder.exists():
            raise ConfigError(
                f"convert: the class {label!r} needs the folder name {folder.name!r}, which "
                f"another class has; write shards instead: --to shards"
            )
        folder.mkdir()
        return folder

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass
