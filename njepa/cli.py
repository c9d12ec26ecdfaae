"""``njepa train | probe | export | scan | convert | plan | replay | info``."""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys

from njepa import __version__

COMMANDS = {
    "train": "njepa.train",
    "probe": "njepa.commands.probe",
    "export": "njepa.commands.export",
    "scan": "njepa.commands.scan",
    "convert": "njepa.commands.convert",
    "plan": "njepa.commands.plan",
    "replay": "njepa.commands.replay",
    "info": "njepa.commands.info",
}

USAGE = """usage: njepa <command> [options]

commands:
  train   pre-train an encoder in one process (like `python njepa/train.py`)
  probe   measure a frozen encoder on labelled images, beside its floors
  export  write an encoder for timm, transformers, ONNX or like an official file
  scan    decode every image once, list the good ones, name the bad ones
  convert write images of any source as tar shards or class folders
  plan    predict FLOPs, memory, traffic and speed on given GPUs, without one
  replay  repeat a bad step of a run and name what was not finite first
  info    print versions, recipes, configuration keys and what runs on this machine

`njepa <command> --help` gives the options.
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
        print(
            f"njepa: unknown command {arguments[0]!r}; known: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    # Imported here: some take seconds for torch, which a typing error or --help should not.
    from njepa.config import ConfigError

    command = importlib.import_module(COMMANDS[arguments[0]])
    try:
        status: int = command.main(arguments[1:], prog=f"njepa {arguments[0]}")
    except ConfigError as error:
        print(f"njepa: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
