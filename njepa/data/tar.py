"""Which images a tar shard holds, and where: members are read in place and never unpacked."""

from __future__ import annotations

import logging
import tarfile
from pathlib import Path

from njepa.data.errors import SourceError

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")

Row = tuple[str, str | None, int, int]  # name, label, offset, bytes


def shard_rows(root: Path, shard: str) -> list[Row]:
    """Images of one tar file: members with the same stem are one sample (WebDataset).

    Raises:
        SourceError: no plain tar file, cut short, or with a member that no data set needs: a link,
            a device, a name that leaves its folder, a name twice. Names never become paths here,
            but what is left out in silence is lost, and other programs do unpack shards.
    """
    path = root / shard
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(path, mode="r:") as tar:
            end = path.stat().st_size
            for member in tar:
                # A size below zero would be read for ever (CVE-2025-8194).
                if not 0 <= member.size <= end - member.offset_data:
                    raise tarfile.ReadError(f"unexpected end of data in {member.name!r}")
                if member.isdir():
                    continue
                if reason := _refused(member) or ("it is there twice" * (member.name in seen)):
                    raise SourceError(
                        f"data: {path} is refused because of its member {member.name!r}: {reason}; "
                        f"expected files below one folder, each once: write the shard again, with "
                        f"tar --dereference --hard-dereference, or with njepa convert"
                    )
                seen.add(member.name)
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not stem:
                    continue
                key = f"{folder}/{stem}"
                if "." + extension.lower() in EXTENSIONS:
                    images.setdefault(key, (member.name, member.offset_data, member.size))
                elif extension.lower() == "cls":
                    data = tar.extractfile(member)
                    assert data is not None  # a regular member
                    labels[key] = data.read(4096).decode("utf-8", "replace").strip()
            _check_end(tar)
    except (SourceError, OSError):
        raise
    except Exception as error:  # TarError, and of damaged headers almost any
        raise SourceError(
            f"data: {path} cannot be read as a tar file ({error}). Compressed shards are not "
            f"supported, since images are read at their offset: unpack it to a plain .tar "
            f"(JPEG does not shrink anyway). A shard that was cut short must be copied again"
        ) from None
    return [
        (f"{shard}/{name}", labels.get(key), offset, size)
        for key, (name, offset, size) in images.items()
    ]


def _refused(member: tarfile.TarInfo) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leaves the shard's folder"
    if member.issym() or member.islnk():
        return f"it is a link to {member.linkname!r}"
    if member.issparse():
        return "it is stored in pieces (sparse)"
    return "" if member.isreg() else "it is a device or a pipe"


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes any header that it cannot read, but the first, for the end of the file."""
    assert tar.fileobj is not None  # open
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no header of a member at byte {tar.offset}")
    if not block:
        logger.warning("%s has no mark at its end: perhaps it was cut short", tar.name)
