"""``njepa scan``: decode a source once, list the good images."""

from __future__ import annotations

import argparse
from pathlib import Path

from njepa.config import ConfigError
from njepa.data.scan import scan


def main(argv: list[str], prog: str) -> int:
    """Write the list and print the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Decode every image once, write a list of the good ones (usable as data.path) "
        "and name the bad ones.",
    )
    parser.add_argument("path", type=Path, help="image folder or list file")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("good.txt"),
        help="list of good images (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {args.workers}")
    print(scan(args.path, args.out, args.workers))
    return 0
