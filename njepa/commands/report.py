"""``njepa report``: run folders as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from njepa.commands.checks import check_writable, chosen_device
from njepa.commands.parsers import command_parser
from njepa.config import ConfigError
from njepa.config.messages import log_to_stderr

DESCRIPTION = """Draw one run, or several beside each other, on a self-contained HTML page:
a verdict on health in words, curves, scores, masks, errors, features, neighbours."""
EPILOG = """A run writes its own page, RUN/report.html, when it ends (eval.report). For example:

  njepa report runs/a                                 # into runs/a/report.html
  njepa report runs/a runs/b runs/c --out abc.html

The page is made from what is there, and says what is missing. docs/report.md explains it.
"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(prog, DESCRIPTION, EPILOG)
    add = result.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    add("--out", type=Path, metavar="FILE", help="the page (default, of one run: RUN/report.html)")
    add("--no-pictures", action="store_true", help="numbers only: no images, no network")
    where = "where features are computed; auto: a GPU if there is one (default: auto)"
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help=where)
    return result


def main(argv: list[str], prog: str) -> int:
    """Write the page, print its place and the verdicts; returns the exit status."""
    args = parser(prog).parse_args(argv)
    log_to_stderr()
    out = args.out
    if out is None:
        if len(args.runs) > 1:
            raise ConfigError("a page of several runs needs --out FILE, got none")
        out = args.runs[0] / "report.html"
    # Only now what takes seconds to import.
    from njepa.report.record import read_runs

    records = read_runs(args.runs)
    check_writable("--out", out)
    import torch

    from njepa.report.write import write_report

    device = torch.device(chosen_device(args.device))
    shown = write_report(records, out, device, pictures=not args.no_pictures)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")
    for run in shown:
        missing = f"; missing, as the page says: {len(run.missing)}" if run.missing else ""
        print(f"{run.record.name}: {run.verdict.title}{missing}")
    return 0
