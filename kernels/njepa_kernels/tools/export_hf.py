"""Write the ops as a folder that Hugging Face's package ``kernels`` loads (0.17 and later).

    python -m njepa_kernels.tools.export_hf OUT
    python -c "from kernels import get_local_kernel; ops = get_local_kernel(Path('OUT'))"

OUT/build/torch-<backend>/ holds the package with the Triton kernels and the reference (without the
C++ library, which belongs to one platform) and metadata.json. Several builds and an installed
njepa_kernels live in one process: each build has its own namespace of torch.ops, named after the
hash of its content, which is also its id.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from .._runtime.library import NAMESPACE

NAME = "njepa-kernels"
LICENSE = "Apache-2.0"
#: Raised when a function or a layer changes incompatibly; the Hub selects by it.
VERSION = 1
#: Builds of torch for which the folder is written; with "cpu" only the reference runs.
BACKENDS = ("cuda", "cpu")

_PACKAGE = Path(__file__).parents[1]
# Of the sources: what compiled code needs, and what serves development only.
_LEFT_OUT = ("native.py", "cases.py", "testing.py")
_NAMESPACE_FILE = "_runtime/library.py"
_NAMESPACE_LINE = f'NAMESPACE = "{NAMESPACE}"\n'


def sources() -> dict[str, str]:
    """Path inside the package -> text, of every file that is shipped, in order."""
    tools = Path(__file__).parent
    paths = sorted(
        path
        for path in _PACKAGE.rglob("*.py")
        if path.name not in _LEFT_OUT and path.parent != tools
    )
    return {path.relative_to(_PACKAGE).as_posix(): path.read_text("utf-8") for path in paths}


def build_id(files: dict[str, str], backend: str) -> str:
    """The same for the same content, on every machine; a Python name."""
    digest = hashlib.sha256(json.dumps([VERSION, backend, files]).encode()).hexdigest()
    return f"{NAME.replace('-', '_')}_{backend}_{digest[:12]}"


def export(out: Path) -> list[Path]:
    """Write the builds into ``out`` and return their folders.

    Raises:
        ValueError: ``out`` is a file or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"export_hf: {out} must be a new or an empty folder; name another one")
    files = sources()
    if files[_NAMESPACE_FILE].count(_NAMESPACE_LINE) != 1:
        raise AssertionError(f"{_NAMESPACE_FILE} must have one line {_NAMESPACE_LINE!r}")
    folders = []
    for backend in BACKENDS:
        identity = build_id(files, backend)
        own = files[_NAMESPACE_FILE].replace(_NAMESPACE_LINE, f'NAMESPACE = "{identity}"\n')
        metadata = {
            "name": NAME,
            "id": identity,
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        folder = out / "build" / f"torch-{backend}"
        for name, text in {**files, _NAMESPACE_FILE: own}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
        folders.append(folder)
    return folders


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m njepa_kernels.tools.export_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="a new or an empty folder")
    out = parser.parse_args(argv).out
    try:
        folders = export(out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for folder in folders:
        metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
        print(f"{folder}: {metadata['id']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
