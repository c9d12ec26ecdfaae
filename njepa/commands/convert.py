"""``njepa convert``: images of any source as tar shards or class folders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from njepa.commands.parsers import command_parser
from njepa.config import ConfigError
from njepa.data.convert import convert

DESCRIPTION = """Copy images, encoded as they are, into a new folder that data.path takes.
What cannot be read is named and left out."""
EPILOG = """For example:

  njepa convert photos.zip shards
  njepa convert train-images-idx3-ubyte.gz digits --to folders
"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(prog, DESCRIPTION, EPILOG)
    add = result.add_argument
    add("source", metavar="SOURCE", type=Path, help="image folder, list, tar shards, Parquet, a "
        "zip, or the images of MNIST's idx files (with the labels beside them)")  # fmt: skip
    add("out", metavar="OUT", type=Path, help="folder to create")
    layout = "tar shards in WebDataset layout, or a folder a class (default: %(default)s)"
    add("--to", choices=("shards", "folders"), default="shards", help=layout)
    size = "images of one shard, in millions of bytes (default: %(default)s)"
    add("--shard-size", metavar="MB", type=float, default=1000, help=size)
    return result


def main(argv: list[str], prog: str) -> int:
    """Write them and print the report; returns the exit status (130: interrupted)."""
    args = parser(prog).parse_args(argv)
    if not args.shard_size > 0:
        raise ConfigError(f"--shard-size must be a number over 0, got {args.shard_size:g}")
    try:
        report = convert(
            args.source.expanduser(), args.out.expanduser(), args.to, int(args.shard_size * 1e6)
        )
    except KeyboardInterrupt:
        print(f"njepa: interrupted; {args.out} is not written", file=sys.stderr)
        return 130
    print(report)
    return 0
