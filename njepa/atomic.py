"""Files that are whole or not there: a reader or a crash never sees half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file; it is on the disk when this returns.

    A link, a device or a pipe (``/dev/stdout``) stays what it is and is written to. File names in a
    text may have any bytes.

    Raises:
        OSError: it cannot be written; a file is what it was.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    if is_place(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first one is the one to tell
            os.unlink(temporary)
        raise


def is_place(path: Path) -> bool:
    """Whether something is at ``path`` that a file in its place would destroy."""
    return path.is_symlink() or (path.exists() and not path.is_file())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, different in every process.

    The file becomes ``path`` when the block ends, and is removed where it raises. For caches: it
    may be lost with the power.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
