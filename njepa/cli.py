"""``njepa train | scan | plan | info``."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from pathlib import Path

from njepa import __version__, train
from njepa.config import Config, Section
from njepa.recipes import load_config, recipe_names

USAGE = """usage: njepa <command> [options]

commands:
  train   pre-train an encoder (the same as `deepspeed njepa/train.py` with one process)
  scan    decode every image of a source, write a list of the good ones, name the bad ones
  plan    FLOPs, memory, traffic and predicted speed of a configuration on some GPUs
  info    versions, recipes, configuration keys, what runs on this machine

`njepa <command> --help` tells more.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

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
    commands = {"train": train.main, "scan": _scan, "plan": _plan, "info": _info}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in commands:
        print(
            f"njepa: unknown command {arguments[0]!r}; known: {', '.join(commands)}",
            file=sys.stderr,
        )
        return 2
    return commands[arguments[0]](arguments[1:], prog=f"njepa {arguments[0]}")


def _scan(argv: list[str], prog: str) -> int:
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
    from njepa.data.scan import scan

    try:
        report = scan(args.path, args.out, args.workers)
    except ValueError as error:
        print(f"njepa: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def _plan(argv: list[str], prog: str) -> int:
    from njepa import plan_command  # imports torch

    return plan_command.main(argv, prog)


def _info(argv: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description="What there is to configure, and what runs here."
    )
    parser.add_argument(
        "--keys", action="store_true", help="every configuration key with its default"
    )
    args = parser.parse_args(argv)
    if args.keys:
        _print_keys(Config)
        return 0
    import njepa_kernels
    import torch

    print(
        f"njepa {__version__}, torch {torch.__version__}, CUDA device: "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}"
    )
    print("\nfused ops:")
    for op, impls in njepa_kernels.available_impls().items():
        print(f"  {op}: " + "; ".join(f"{impl}: {why}" for impl, why in impls.items()))
    print("\nrecipes:")
    for name in recipe_names():
        c = load_config(name, ["data.path=."])
        patches = f"{c.model.encoder}/{c.model.patch_size} at {c.data.image_size} px"
        print(f"  {name}: {c.method}, {patches}, {c.optim.epochs} epochs")
    print("\n`njepa info --keys` lists the configuration.")
    return 0


def _print_keys(model: type[Section], prefix: str = "") -> None:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            _print_keys(kind, f"{prefix}{name}.")
            continue
        text = " ".join((field.description or "").split())
        print(f"{prefix}{name} = {field.default!r}\n    {text}")


if __name__ == "__main__":
    sys.exit(main())
