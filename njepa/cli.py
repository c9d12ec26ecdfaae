"""``njepa COMMAND ...``: the commands and how they end."""

from __future__ import annotations

import difflib
import importlib
import os
import select
import signal
import sys

from njepa import __version__

#: Name of the command, its module, what it does.
COMMANDS = {
    "train": ("njepa.train", "pre-train an encoder in one process (like `python njepa/train.py`)"),
    "probe": ("njepa.commands.probe", "measure a frozen encoder on labelled images"),
    "export": ("njepa.commands.export", "write an encoder for timm, transformers, ONNX, ..."),
    "report": ("njepa.commands.report", "draw runs on one HTML page: verdict, curves, pictures"),
    "scan": ("njepa.commands.scan", "decode every image once, list the good ones, name the bad"),
    "convert": ("njepa.commands.convert", "write images as tar shards or class folders"),
    "plan": ("njepa.commands.plan", "predict FLOPs, memory, traffic and speed without a GPU"),
    "replay": ("njepa.commands.replay", "repeat a bad step, name what was not finite first"),
    "info": ("njepa.commands.info", "print versions, recipes, keys and what runs here"),
    "completion": (
        "njepa.commands.completion",
        "print a script that completes all of this in a shell",
    ),
}

_ROWS = "".join(f"  {name:12}{what}\n" for name, (_, what) in COMMANDS.items())
USAGE = f"""usage: njepa <command> [options]

commands:
{_ROWS}
`njepa <command> --help` gives the options, their defaults and examples.
`njepa --version` prints the version.

exit status: 0 done, 1 a fault, 2 input that cannot work; docs/cli.md
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 bad input, else as the command says.

    A reader that closes the pipe early (``njepa info --keys | head``) ends it without a word and
    with the status of a program that SIGPIPE ended, 141.
    """
    try:
        try:
            return _command(sys.argv[1:] if argv is None else argv)
        finally:  # argparse leaves by SystemExit; what is printed must be out before Python ends
            sys.stdout.flush()
    except BrokenPipeError:
        gone = [fd for fd in (1, 2) if _reader_is_gone(fd)]
        if not gone:  # another pipe broke, perhaps one to a loader's process: that is a fault
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in gone:  # what is still buffered would be the same error at exit
            os.dup2(nowhere, fd)
        return 128 + signal.SIGPIPE


def _reader_is_gone(fd: int) -> bool:
    """Whether ``fd`` writes to a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        known = f"{meant}known: {', '.join(COMMANDS)}"
        print(f"njepa: unknown command {arguments[0]!r}; {known}", file=sys.stderr)
        return 2
    # Imported here: some take seconds for torch, which a typing error or --help should not.
    from njepa.config import ConfigError

    command = importlib.import_module(COMMANDS[arguments[0]][0])
    try:
        status: int = command.main(arguments[1:], prog=f"njepa {arguments[0]}")
    except ConfigError as error:
        print(f"njepa: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
