"""The form that the help of every command has."""

from __future__ import annotations

import argparse


def command_parser(prog: str | None, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser that prints both texts as they stand: what it does first, examples last."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
