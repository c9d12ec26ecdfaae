"""``njepa scan``: decode a source once, list the good images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from njepa.commands.parsers import command_parser
from njepa.config import ConfigError
from njepa.data.scan import scan

DESCRIPTION = """Decode every image once, list the good ones (the list works as data.path) and name
the bad ones. Shards and Parquet are only reported on. After an interrupt the same
command goes on where it was."""
EPILOG = """For example:

  njepa scan photos --out good.txt
  njepa train --recipe folder-small data.path=good.txt
"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(prog, DESCRIPTION, EPILOG)
    add = result.add_argument
    add("path", metavar="PATH", type=Path, help="what data.path takes")
    out = "list of good images (default: %(default)s)"
    add("--out", metavar="FILE", type=Path, default=Path("good.txt"), help=out)
    add("--workers", metavar="N", type=int, help="processes (default: all cores)")
    return result


def main(argv: list[str], prog: str) -> int:
    """Write the list and print the report; returns the exit status (130: interrupted)."""
    args = parser(prog).parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {args.workers}")
    try:
        report = scan(args.path, args.out, args.workers)
    except KeyboardInterrupt:
        print("njepa: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    print(report)
    return 0
