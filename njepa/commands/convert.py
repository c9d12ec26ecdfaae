"""``njepa convert``: images of any source as tar shards or class folders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from njepa.config import ConfigError
from njepa.data.convert import convert


def main(argv: list[str], prog: str) -> int:
    """Write them and print the report; returns the exit status (130: interrupted)."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Copy images, encoded as they are, into a new folder that data.path takes. "
        "What cannot be read is named and left out.",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="image folder, list, tar shards, Parquet, a zip, or the images of MNIST's idx files "
        "(train-images-idx3-ubyte.gz, with the labels beside it)",
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--to",
        choices=("shards", "folders"),
        default="shards",
        help="tar shards in WebDataset layout, or a folder a class (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-size",
        type=float,
        default=1000,
        metavar="MB",
        help="images of one shard, in millions of bytes (default: %(default)s)",
    )
    args = parser.parse_args(argv)
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
