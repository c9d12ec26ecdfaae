"""What ``njepa convert`` reads: any ``data.path``, a zip, or MNIST's idx files."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from njepa.data.decode import fault, open_image
from njepa.data.errors import SourceError
from njepa.data.folders import walk
from njepa.data.idx import IdxImages, is_idx
from njepa.data.index import build_index
from njepa.data.listing import find_source
from njepa.data.tar import EXTENSIONS

_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "BMP": "bmp", "WEBP": "webp", "PPM": "ppm",
            "TIFF": "tif"}  # fmt: skip
_LARGEST = 1 << 30  # bytes of an unpacked member; no image is that large


class Item(NamedTuple):
    """An image to write."""

    data: bytes
    """Encoded, as in the source."""
    extension: str
    label: str | None


@dataclass
class Images:
    """All images of a source, in the order of their sample ids."""

    total: int
    size: int
    """Bytes to write, as far as known."""
    items: Iterator[Item]
    left_out: list[str] = field(default_factory=list)
    """Names with reasons; complete once ``items`` is read."""


def open_images(path: Path, progress: bool) -> Images:
    """Whatever kind of source ``path`` is.

    Raises:
        SourceError: nothing there, or nothing that can be converted.
    """
    if path.is_dir():
        packed = sorted(p.name for p in path.iterdir() if is_idx(p) and "idx3" in p.name)
        if packed:
            raise SourceError(
                f"data: {path} holds idx files; name the one of the images: "
                f"{' or '.join(str(path / name) for name in packed[:3])}"
            )
    if path.is_file() and is_idx(path):
        idx = IdxImages(path)
        return Images(idx.n, 0, (Item(data, "png", label) for data, label in idx))
    if path.is_file() and path.suffix.lower() == ".zip":
        return _from_zip(path)
    return _from_index(path, progress)


def _from_index(path: Path, progress: bool) -> Images:
    source = find_source(path, progress)
    index = build_index(source, progress)
    found = Images(index.n, int(index.sizes.sum()), iter(()), list(index.unreadable))
    if source.kind == "folder":
        others = [name for name, _, _ in walk(source.root)[0] if not _has_extension(name)]
        found.left_out += [f"{name} ({_no_image(name)})" for name in others]

    def items() -> Iterator[Item]:
        for i in range(index.n):
            label = None if index.labels is None else index.classes[index.labels[i]]
            try:
                data = index.read(i)
            except OSError as error:
                found.left_out.append(f"{index.name(i)} ({error})")
                continue
            yield from _item(index.name(i), data, label, found.left_out)

    found.items = items()
    return found


def _from_zip(path: Path) -> Images:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # BadZipFile, and of damaged headers almost any
        raise SourceError(
            f"data: {path} cannot be read as a zip ({error}); it is damaged or was cut short: copy "
            f"it again"
        ) from None
    members = sorted(_members(path, archive), key=lambda m: os.fsencode(m.filename))
    images = [m for m in members if _has_extension(m.filename)]
    if not images:
        raise SourceError(
            f"data: no image among the {len(members)} files of {path}; expected names that end in "
            f"{' '.join(EXTENSIONS)}"
        )
    # The folder around everything is no class.
    around = os.path.commonpath([os.path.dirname(m.filename) for m in images])
    short = [os.path.relpath(m.filename, around or ".") for m in images]
    labelled = all("/" in name for name in short)
    left_out = [
        f"{m.filename} ({_no_image(m.filename)})"
        for m in members
        if not _has_extension(m.filename)
    ]  # fmt: skip
    found = Images(len(images), sum(m.file_size for m in images), iter(()), left_out)

    def items() -> Iterator[Item]:
        with archive:
            for member, name in zip(images, short, strict=True):
                label = name.split("/", 1)[0] if labelled else None
                try:
                    if member.file_size > _LARGEST:
                        raise OSError(f"{member.file_size} bytes, at most {_LARGEST} are taken")
                    data = archive.read(member)
                except Exception as error:  # each kind of compression has its own
                    left_out.append(f"{member.filename} ({error})")
                    continue
                yield from _item(member.filename, data, label, left_out)

    found.items = items()
    return found


def _members(path: Path, archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    """Files that are not hidden. An archive that reaches out of its folder is refused whole."""
    for member in archive.infolist():
        parts = member.filename.split("/")
        reason = "" if member.filename else "it has no name"
        if member.filename.startswith("/") or ".." in parts or ":" in parts[0]:
            reason = "its name leaves the archive's folder"
        elif stat.S_IFMT(mode := member.external_attr >> 16) and not (
            stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        ):
            reason = "it is a link" if stat.S_ISLNK(mode) else "it is a device or a pipe"
        elif member.flag_bits & 1:
            reason = "it is encrypted"
        if reason:
            raise SourceError(
                f"data: {path} is refused because of its member {member.filename!r}: {reason}; "
                f"expected files below one folder: unpack it yourself and convert the folder"
            )
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if not member.is_dir() and not hidden:
            yield member


def _item(name: str, data: bytes, label: str | None, left_out: list[str]) -> Iterator[Item]:
    """The image under the extension of its content; nothing where its header is damaged."""
    try:
        with open_image(data) as image:
            kind = image.format or "no known format"
    except Exception as error:  # damaged files make Pillow raise almost anything
        left_out.append(f"{name} ({fault(error, len(data))})")
        return
    extension = _FORMATS.get(kind)
    if extension is None and _has_extension(name):  # read under this name before, and after
        extension = name.rpartition(".")[2].lower()
    if extension is None:
        left_out.append(f"{name} ({kind}, which has none of the extensions {' '.join(EXTENSIONS)})")
        return
    yield Item(data, extension, label)


def _has_extension(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _no_image(name: str) -> str:
    return f"no image: ends in {os.path.splitext(name)[1]!r}"
