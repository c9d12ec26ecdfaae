"""``njepa replay``: repeat a bad step, and name what was not finite first."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from njepa.commands.parsers import command_parser
from njepa.config import ConfigError
from njepa.runs.dumps import Dump, read_dump

if TYPE_CHECKING:
    from njepa.training.replaying import Replayed


DESCRIPTION = """Repeat a bad step of a run from the checkpoint kept beside it, with the same
samples, crops, masks and noise, and name the first module whose output or gradient
is not finite. Status 1: this time all was finite."""
EPILOG = """For example:

  njepa replay runs/ijepa/bad/step-00000123.json
  torchrun --nproc-per-node 2 -m njepa.cli replay runs/ijepa/bad/step-00000123.json

The second: bit for bit, where the training had two ranks.
"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(prog, DESCRIPTION, EPILOG)
    add = result.add_argument
    add("dump", metavar="DUMP", type=Path, help="bad/step-XXXXXXXX.json in a run folder")
    device = "where to run (default: %(default)s)"
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help=device)
    return result


def main(argv: list[str], prog: str) -> int:
    """Print what the step did; returns 0 if it was bad again, 1 if it was not."""
    args = parser(prog).parse_args(argv)
    dump = read_dump(args.dump)
    if args.dump.resolve().parent.name != "bad":
        raise ConfigError(f"{args.dump} must lie in the folder bad/ of its run")
    from njepa.runs.ranks import join_ranks, leave_ranks
    from njepa.training.replaying import replay

    ranks = join_ranks(args.device)
    try:
        found = replay(dump, args.dump.resolve().parent.parent, ranks)
    except BaseException as error:
        leave_ranks(error)
        raise
    leave_ranks()
    if ranks.main:
        print(_told(dump, found))
    return 0 if found.bad else 1


def _told(dump: Dump, found: Replayed) -> str:
    """The step then and now."""
    share = [micro for rank in dump.terms for micro in rank] if found.exact else []
    then = share[: len(found.terms)]
    lines = [
        f"step {dump.step + 1}, epoch {dump.epoch}, from {found.came_from}",
        f"seed {dump.seed}, rollbacks before {dump.salt}, lr {dump.lr:g}",
        f"samples {dump.sample_ids}",
    ]
    for j, terms in enumerate(found.terms):
        same = f", as then: {terms == then[j]}" if then else ""
        shown = ", ".join(f"{name} {value}" for name, value in terms.items())
        lines.append(f"terms of micro-batch {j}: {shown}{same}")
    if not found.exact:
        lines.append(
            f"the training had {dump.ranks} ranks: values agree up to the rounding of reductions"
        )
    seen = found.seen
    lines += [
        f"norm of the gradient: {found.norm}, then {dump.gradient.get('norm', 'not kept')}",
        f"first output that is not finite: {seen.output or 'none'}",
        f"first gradient that is not finite: {seen.gradient or 'none'}",
        f"parameters with such gradients: {len(seen.parameters)} {seen.parameters[:5]}",
        "bad again" if found.bad else "this time all was finite: the step is not repeated",
    ]
    return "\n".join(lines)
