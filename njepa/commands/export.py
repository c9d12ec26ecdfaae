"""``njepa export``: an encoder for other libraries."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from njepa.commands.parsers import command_parser

DESCRIPTION = """Write an encoder for another library into a new folder, with a model card.
Where that library is installed, its features are compared with ours."""
EPILOG = """formats, and how each is loaded:
  timm          timm.create_model("local-dir:OUT", pretrained=True)
  transformers  IJepaModel.from_pretrained("OUT"), versions 4 and 5
  ijepa         the layout of official files: both encoders and the predictor
  safetensors   one encoder under timm's names, and a JSON file with its facts
  onnx          a graph on normalised images

For example:

  njepa export runs/shapes-tiny exported --format timm
"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(prog, DESCRIPTION, EPILOG)
    formats = ("timm", "transformers", "ijepa", "safetensors", "onnx")
    result.add_argument(
        "source",
        metavar="SOURCE",
        help="run, checkpoint, export, official .pth.tar, folder of timm or transformers, or the "
        "name of one in Hugging Face's cache",
    )
    result.add_argument("out", type=Path, metavar="OUT", help="new folder")
    result.add_argument("--format", choices=formats, required=True, help="see below")
    result.add_argument(
        "--which",
        choices=("target", "context"),
        help="the encoder (default: target); with ijepa the one under the key `encoder`, where "
        "timm and transformers look (default: context, as in official files)",
    )
    return result


def main(argv: list[str], prog: str) -> int:
    """Write it, say what was written; returns the exit status (1: the library reads it wrong)."""
    args = parser(prog).parse_args(argv)
    from njepa.exchange.export import export  # torch takes seconds; --help should not

    try:
        print(export(args.source, args.out, args.format, args.which))
    except RuntimeError as error:
        print(f"njepa: {error}", file=sys.stderr)
        return 1
    return 0
