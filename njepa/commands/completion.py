"""``njepa completion``: a script that completes commands and options in a shell."""

from __future__ import annotations

import argparse
import importlib

from njepa.commands.parsers import command_parser
from njepa.config import ConfigError

SHELLS = ("bash", "zsh", "tcsh")
EPILOG = """For example:

  njepa completion bash > ~/.local/share/bash-completion/completions/njepa
  njepa completion zsh > ~/.zfunc/_njepa      # a folder of $fpath

A new shell reads it.
"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(
        prog, "Print a script that completes the commands and options of njepa.", EPILOG
    )
    result.add_argument("shell", choices=SHELLS, help="the shell to print it for")
    return result


def main(argv: list[str], prog: str) -> int:
    """Print it; returns the exit status."""
    args = parser(prog).parse_args(argv)
    try:
        import shtab
    except ModuleNotFoundError:
        raise ConfigError("completion needs shtab: pip install shtab") from None
    print(shtab.complete(all_commands(), args.shell))
    return 0


def all_commands() -> argparse.ArgumentParser:
    """One parser with every command below it, as shtab wants it."""
    from njepa.cli import COMMANDS

    top = argparse.ArgumentParser(prog="njepa", description="Pre-train Vision Transformers.")
    top.add_argument("--version", action="store_true", help="print the version")
    commands = top.add_subparsers(dest="command")
    for name, (module, what) in COMMANDS.items():
        of_command = importlib.import_module(module).parser(f"njepa {name}")
        commands.add_parser(name, parents=[of_command], add_help=False, help=what)
    return top
